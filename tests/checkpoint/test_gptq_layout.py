"""The tensors of GPTQ checkpoints, read as plain bit loops read them."""

from __future__ import annotations

import numpy as np
import pytest
from edgepress.pipeline.checkpoint.importers import gptq as layout
from edgepress.pipeline.checkpoint.packed import unpack_bits
from edgepress.pipeline.errors import ModelError
from gptq_words import checkpoint_tensors, pack_words, random_checkpoint, unpack_words, v1_zeros

BITS = (2, 3, 4, 8)


@pytest.mark.parametrize("count", [32, 64, 96])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_int32(bits: int, count: int) -> None:
    """3-bit codes run across words; each width against a plain bit loop, from a transposed view as GPTQ's is."""
    codes = np.random.default_rng(count).integers(0, 1 << bits, (5, count), dtype=np.uint8)
    words = pack_words(codes, bits)
    assert np.array_equal(layout.unpack_int32(words, bits), codes)
    assert np.array_equal(layout.unpack_int32(np.ascontiguousarray(words.T).T, bits), codes)
    assert np.array_equal(unpack_words(words, bits, count), codes)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_zero_points_of_both_formats(bits: int, format: str) -> None:
    """v1 stores zero - 1, v2 the zero itself: read as the other, every weight is off by one step."""
    codes, zeros, scales, tensors = random_checkpoint(bits, 96, 32, format)
    linear = layout.convert("m", codes.shape, tensors, bits, 32, format)
    assert np.array_equal(linear.zeros, zeros)
    assert np.array_equal(linear.unpacked(), codes)
    assert np.array_equal(linear.scales, scales.astype(np.float32))


@pytest.mark.parametrize("bits", BITS)
def test_gptq_v1_zero_point_of_zero(bits: int) -> None:
    """A group without negative weights has zero point 0, and fields of v1 cannot be read one by one then.

    gptqmodel subtracts one from every field in whole words and adds it again when it loads: a 0 borrows from the field above.
    """
    codes, zeros, _, tensors = random_checkpoint(bits, 96, 32, "gptq", lowest=0)
    zeros[:, 1] = np.arange(32) % 2 * 3  # every other one is 0
    tensors["qzeros"] = v1_zeros(zeros.T, bits)
    linear = layout.convert("m", codes.shape, tensors, bits, 32, "gptq")
    assert np.array_equal(linear.zeros, zeros)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_padded_rows(bits: int, format: str) -> None:
    """172 inputs at group 32: gptqmodel's own padding is dropped, and ours, up to the operator's block, means zero."""
    codes, zeros, scales, tensors = random_checkpoint(bits, 172, 32, format)
    assert tensors["qweight"].shape[0] * 32 // bits == 192
    linear = layout.convert("m", (32, 172), tensors, bits, 32, format)
    assert linear.shape == (32, 172) and linear.groups == 6
    assert np.array_equal(linear.unpacked(), codes)
    padded = unpack_bits(linear.codes, bits, 32).reshape(32, 192)[:, 172:]
    assert (padded == zeros[:, -1:]).all()
    spread = np.repeat(np.arange(6), 32)[:172]
    expected = (codes.astype(np.float32) - zeros[:, spread].astype(np.float32)) * scales.astype(np.float32)[:, spread]
    assert np.array_equal(linear.dequantized(), expected)


@pytest.mark.parametrize(("bits", "words"), [(2, (11, 12)), (3, (17, 18)), (4, (22, 24)), (8, (43, 48))])
def test_width_of_rows_that_are_padded_or_not(bits: int, words: tuple[int, int]) -> None:
    """Trap 11: 172 codes a row, as AutoGPTQ stores them and as gptqmodel pads them to 192."""
    assert [layout.width("m", count, 172) for count in words] == [bits, bits]
    with pytest.raises(ModelError, match="cannot hold 172 codes"):
        layout.width("m", words[1] + 2, 172)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_symmetric_needs_no_zeros(bits: int, format: str) -> None:
    """All zero points in the middle are the operator's default; one that is not keeps them all."""
    codes, zeros, scales, _ = random_checkpoint(bits, 64, 32, format)
    zeros[:] = 1 << (bits - 1)
    tensors = checkpoint_tensors(codes, zeros, scales, bits, 32, format)
    assert layout.convert("m", codes.shape, tensors, bits, 32, format).zeros is None
    zeros[3, 1] -= 1
    tensors = checkpoint_tensors(codes, zeros, scales, bits, 32, format)
    assert np.array_equal(layout.convert("m", codes.shape, tensors, bits, 32, format).zeros, zeros)


def test_gptq_refuses_what_it_cannot_read() -> None:
    """An unknown zero point format or rows in another order would give plausible, wrong weights."""
    codes, _, _, tensors = random_checkpoint(4, 64, 32, "gptq")
    with pytest.raises(ModelError, match="gptq_v3"):
        layout.convert("m", codes.shape, tensors, 4, 32, "gptq_v3")
    uneven = np.where(np.arange(64) < 30, 0, 1)
    with pytest.raises(ModelError, match="g_idx"):
        layout.convert("m", codes.shape, tensors | {"g_idx": uneven}, 4, 32, "gptq")


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("bits", "columns", "group"), [(2, 96, 32), (4, 96, 64), (4, 172, 32), (8, 64, 16), (3, 96, 32)])
def test_gptq_act_order(bits: int, columns: int, group: int, zeros: bool) -> None:
    """Trap 1 begins here: rows are sorted by group once, and each weight comes out with the scale of its own group."""
    codes, points, scales, _ = random_checkpoint(bits, columns, group, "gptq")
    if not zeros:
        points[:] = 1 << (bits - 1)
    tensors = checkpoint_tensors(codes, points, scales, bits, group, "gptq")
    tensors["g_idx"] = np.random.default_rng(columns).permutation(tensors["g_idx"])
    linear = layout.convert("m", codes.shape, tensors, bits, group, "gptq")
    of = tensors["g_idx"]
    expected = (codes.astype(np.float32) - points[:, of].astype(np.float32)) * scales.astype(np.float32)[:, of]
    assert np.array_equal(linear.dequantized(), expected)
    assert linear.permutation is not None and linear.permutation.dtype == np.int32
    assert np.array_equal(linear.unpacked(), codes[:, linear.permutation])
    assert (linear.zeros is None) != zeros


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 172, 576])
def test_gptq_per_channel(bits: int, columns: int) -> None:
    """One scale a row is repeated for blocks that the operator carries; the weights are the same."""
    codes, zeros, scales, tensors = random_checkpoint(bits, columns, columns, "gptq")
    linear = layout.convert("m", codes.shape, tensors | {"g_idx": np.zeros(columns, np.int32)}, bits, -1, "gptq")
    assert linear.group_size in (16, 32, 64, 128, 256) and linear.permutation is None
    assert np.array_equal(linear.dequantized(), (codes.astype(np.float32) - zeros) * scales.astype(np.float32))
