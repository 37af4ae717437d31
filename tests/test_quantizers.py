"""What quantizers return: round to nearest by its definition, bitsandbytes and GPTQ against the packages themselves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.importers import gptq as layout
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear, unpack_bits
from edgepress.pipeline.errors import ModelError, OptionError, ProofError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import bnb, gptq, isolated, rtn
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.pack import quantize_checkpoint
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.stages import run
from edgepress.pipeline.text.windows import text_windows
from safetensors.numpy import load_file
from transformers import LlamaConfig

BITS = (2, 3, 4, 8)


def matrices(folder: Path) -> dict[str, np.ndarray]:
    """The block matrices of a one-file Llama checkpoint, read without edgepress."""
    found = load_file(folder / "model.safetensors")
    return {n.removesuffix(".weight"): w for n, w in found.items() if n.endswith("_proj.weight")}


def no_windows() -> list[np.ndarray]:
    raise AssertionError("this quantizer needs no calibration")


def job_of(folder: Path, windows: Callable[[], list[np.ndarray]] = no_windows, **options: Any) -> QuantizeJob:
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices(folder).items()}
    scratch = folder.with_name(f"{folder.name}-scratch")
    return QuantizeJob(Checkpoint(folder), shapes, windows, QuantizeOptions(**options), scratch)


# ---------------------------------------------------------------------------------------------- round to nearest


def weights_like(kind: str, rows: int = 12, columns: int = 172) -> np.ndarray:
    dice = np.random.default_rng(columns)
    weight = dice.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.05)
    if kind == "positive":
        weight = np.abs(weight) + np.float32(0.3)  # a range without zero would lose the exact zero
    elif kind == "negative":
        weight = -np.abs(weight) - np.float32(0.3)
    elif kind == "outlier":
        weight[:, ::50] *= 100
    elif kind == "sparse":
        weight[dice.random(weight.shape) < 0.5] = 0
        weight[3] = 0
        weight[4, 32:64] = 0
    elif kind == "constant":
        weight[:] = np.linspace(-0.4, 0.7, rows, dtype=np.float32)[:, None]
    elif kind == "tiny":
        weight *= np.float32(1e-30)
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "outlier", "sparse", "constant", "tiny"])
def test_rtn_is_within_half_a_step(kind: str, bits: int, symmetric: bool) -> None:
    """The definition: no code in reach lies nearer. A clipped end, a shifted zero point or mixed groups would show."""
    weight = weights_like(kind)
    linear = round_to_nearest("m", weight, bits, 32, symmetric)
    step = np.repeat(linear.scales, 32, axis=1)[:, :172]
    assert (np.abs(linear.dequantized() - weight) <= step * np.float32(0.5 + 2e-5)).all()
    assert (linear.zeros is None) == symmetric
    assert np.isfinite(linear.scales).all() and (linear.scales > 0).all()
    # and the step is no wider than the group's range asks for: twice its largest weight, in 2^bits - 1 steps
    largest = np.pad(np.abs(weight), ((0, 0), (0, 20))).reshape(12, 6, 32).max(-1)
    assert (linear.scales[largest > 0] <= 2 * largest[largest > 0] / ((1 << bits) - 1) * 1.0001).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["sparse", "positive", "negative"])
def test_rtn_keeps_zero(kind: str, bits: int, symmetric: bool) -> None:
    """Zero stays exactly zero, also among weights of one sign: pruned weights and padding must add nothing."""
    weight = weights_like(kind)
    weight[:, ::7] = 0
    restored = round_to_nearest("m", weight, bits, 32, symmetric).dequantized()
    assert (restored[weight == 0] == 0).all()
    if kind == "sparse":
        assert not restored[3].any() and not restored[4, 32:64].any()


@pytest.mark.parametrize("bits", BITS)
def test_rtn_constant_rows(bits: int) -> None:
    """A group of one value is an end of its range, which asymmetric codes hold exactly."""
    weight = weights_like("constant")
    assert np.allclose(round_to_nearest("m", weight, bits, 32, False).dequantized(), weight, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_more_bits_are_better(symmetric: bool) -> None:
    """Each width must be worth its bytes: every bit about halves the error."""
    weight = weights_like("normal", 64, 256)
    errors = [np.linalg.norm(round_to_nearest("m", weight, b, 64, symmetric).dequantized() - weight) for b in (8, 4, 3, 2)]
    assert errors[0] * 12 < errors[1] and errors[1] * 1.8 < errors[2] and errors[2] * 1.8 < errors[3]


def test_rtn_takes_every_matrix(tiny: Path) -> None:
    """The quantizer: all matrices of the blocks, options obeyed."""
    job = job_of(tiny, method="rtn", bits=2, group_size=16, symmetric=True)
    found = rtn.quantize(job)
    assert set(found) == set(job.linears) and len(found) == 28
    for name, weight in matrices(tiny).items():
        assert (found[name].name, found[name].bits, found[name].group_size) == (name, 2, 16)
        assert np.array_equal(found[name].codes, round_to_nearest(name, weight, 2, 16, True).codes)


# ------------------------------------------------------------------------------------- trained models, known values


@dataclass
class Trained:
    """A trained model whose block matrices can be replaced, and its perplexity on a text."""

    folder: Path
    windows: list[np.ndarray]

    def __post_init__(self) -> None:
        self.model = load_model(self.folder)
        self.linears = block_linears(self.model)
        self.weights = {name: module.weight.detach().numpy().copy() for name, module in self.linears.items()}

    def perplexity(self, replace: dict[str, PackedLinear] | None = None) -> float:
        """Over all windows, with other matrices in the blocks when given."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model gains nothing by more, and loses ten times on a busy machine
        with torch.inference_mode():
            for name, module in self.linears.items():
                weight = replace[name].dequantized() if replace else self.weights[name]
                module.weight.copy_(torch.from_numpy(weight))
            ids = [torch.from_numpy(row)[None] for row in self.windows]
            losses = [self._losses(rows) for rows in ids]
        torch.set_num_threads(threads)
        return float(torch.cat(losses).double().mean().exp())

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=rows, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")

    def rounded(self, bits: int, group: int, symmetric: bool = False) -> dict[str, PackedLinear]:
        """Every matrix rounded to nearest."""
        return {name: round_to_nearest(name, w, bits, group, symmetric) for name, w in self.weights.items()}


@pytest.mark.parametrize(
    ("name", "full", "four", "three"), [("stories260k", 4.27, 4.90, 16.7), ("babyllama-361", 2.20, 2.28, 3.00)]
)
def test_known_perplexities(
    name: str, full: float, four: float, three: float, shared_model: Callable[[str], Path], tinystories: Path
) -> None:
    """Perplexities that were measured elsewhere: a wrong window, BOS or weight would move them.

    Round-to-nearest is no worse than the published values, which used a coarser symmetric scale.
    """
    folder = shared_model(name)
    trained = Trained(folder, text_windows(tinystories, folder, budget=16000))
    whole = trained.perplexity()
    assert whole == pytest.approx(full, rel=0.005)
    found = [trained.perplexity(trained.rounded(bits, 32)) for bits in (8, 4, 3)]
    assert found[0] == pytest.approx(whole, rel=0.005)
    assert whole * 1.005 < found[1] <= four
    assert found[1] * 1.1 < found[2] <= three


# -------------------------------------------------------------------------------------------------- bitsandbytes


def bitsandbytes_4bit(weight: np.ndarray, kind: str) -> tuple[bytes, bytes, np.ndarray]:
    """Codes and absmax of the matrix, and its weights restored by bitsandbytes.

    They are restored as one row: the AVX512 kernel of bitsandbytes 0.50.2 takes the wrong absmax for some widths that 64
    does not divide (96, 160, 352), though its quantization runs over the flattened matrix.
    """
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type=kind)
    flat = functional.quantize_4bit(torch.from_numpy(weight.reshape(-1)), blocksize=64, quant_type=kind)
    assert torch.equal(flat[0], codes) and torch.equal(flat[1].absmax, state.absmax)
    return codes.numpy().tobytes(), state.absmax.numpy().tobytes(), functional.dequantize_4bit(*flat).numpy().reshape(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bnb_4bit_is_bitsandbytes_own(tiny: Path, kind: str) -> None:
    """Codes and absmax byte for byte: what a user of bitsandbytes would get is what ships."""
    found = bnb.quantize_4bit(job_of(tiny, method=kind))
    assert len(found) == 28
    for name, weight in matrices(tiny).items():
        codes, absmax, truth = bitsandbytes_4bit(weight, kind)
        assert found[name].codebook == kind and found[name].shape == weight.shape
        assert found[name].codes.tobytes() == codes
        assert found[name].scales.tobytes() == absmax
        assert np.array_equal(found[name].dequantized(), truth)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_bnb_int8_is_bitsandbytes_own(tiny: Path, group: int) -> None:
    """Codes are q + 128 with one scale a row, repeated for the operator's blocks, the last one of 96 padded."""
    from bitsandbytes import functional

    found = bnb.quantize_int8(job_of(tiny, method="int8", group_size=group))
    assert len(found) == 28
    for name, weight in matrices(tiny).items():
        q, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
        linear = found[name]
        assert linear.zeros is None and linear.bits == 8 and linear.scales.shape == (weight.shape[0], linear.groups)
        assert np.array_equal(linear.unpacked().astype(np.int16) - 128, q.numpy())
        assert (linear.scales == linear.scales[:, :1]).all()
        assert np.allclose(linear.scales[:, 0] * 127, absmax.numpy(), rtol=2e-7, atol=0)
        # half a step, and what the float16 that bitsandbytes takes had rounded off before
        assert (np.abs(linear.dequantized() - weight) <= 0.501 * linear.scales[:, :1] + np.abs(weight) * 2.0**-11).all()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_bnb_zero_rows(tmp_path: Path, method: str) -> None:
    """A row that was pruned to zero has absmax 0: it stays zero and brings no NaN."""
    from safetensors.numpy import save_file

    weight = np.random.default_rng(0).standard_normal((4, 128), dtype=np.float32)
    weight[1] = 0
    save_file({"a_proj.weight": weight}, tmp_path / "model.safetensors")
    quantize = bnb.quantize_int8 if method == "int8" else bnb.quantize_4bit
    restored = quantize(job_of(tmp_path, method=method, group_size=64))["a_proj"].dequantized()
    assert not restored[1].any()
    assert 0 < np.abs(restored - weight).max() < 0.6


def test_bnb_values_survive_a_forward(tiny: Path) -> None:
    """On CPUs with AVX512-BF16 a Linear4bit repacks codes and absmax in its first forward, and what is read after is corrupt.

    Ours come from the weights alone: neither those taken before nor those taken after such a forward change.
    """
    import bitsandbytes

    before = bnb.quantize_4bit(job_of(tiny, method="nf4"))
    kept = {name: (x.codes.tobytes(), x.scales.tobytes()) for name, x in before.items()}
    for weight in matrices(tiny).values():
        rows, columns = weight.shape
        if columns % 64:
            continue  # bitsandbytes' own repacking raises there
        module = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        module.weight = bitsandbytes.nn.Params4bit(torch.from_numpy(weight), quant_type="nf4", compress_statistics=False)
        module = module.to("cpu").eval().requires_grad_(False)
        absmax = module.weight.quant_state.absmax.numpy().copy()
        with torch.inference_mode():
            module(torch.ones(1, columns))
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # the trap, on CPUs that have it
            assert not np.array_equal(state.absmax.float().numpy().reshape(-1), absmax)
    after = bnb.quantize_4bit(job_of(tiny, method="nf4"))
    for name, weight in matrices(tiny).items():
        assert (before[name].codes.tobytes(), before[name].scales.tobytes()) == kept[name]
        assert (after[name].codes.tobytes(), after[name].scales.tobytes()) == kept[name] == bitsandbytes_4bit(weight, "nf4")[:2]


# ----------------------------------------------------------------------------------- GPTQ: reading its checkpoints


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into int32 words by a plain bit loop, lower bits first, the last word filled with zeros."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), dtype=np.uint32)
    for row in range(rows):
        for i in range(count):
            for bit in range(bits):
                place = i * bits + bit
                words[row, place // 32] |= np.uint32((int(codes[row, i]) >> bit & 1) << (place % 32))
    return words.view(np.int32)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse, through one big integer a row."""
    rows = [int.from_bytes(row.astype("<u4").tobytes(), "little") for row in np.ascontiguousarray(words).view(np.uint32)]
    return np.array([[row >> (i * bits) & ((1 << bits) - 1) for i in range(count)] for row in rows], dtype=np.uint8)


def ones(bits: int) -> np.uint32:
    """One in every field of a word."""
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))


def v1_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Zero points (groups, out) as gptqmodel writes format v1: it subtracts one from every field.

    For 2, 4 and 8 bits from whole words (convert_gptq_v2_to_v1_format_module), so that a zero borrows from the field above.
    """
    if bits == 3:
        return pack_words((zeros - np.uint8(1)) & np.uint8(7), 3)
    return (pack_words(zeros, bits).view(np.uint32) - ones(bits)).view(np.int32)


def checkpoint_tensors(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, group: int, format: str
) -> dict[str, np.ndarray]:
    """What gptqmodel stores for codes (out, in), zeros and scales (out, groups)."""
    packed_zeros = pack_words(zeros.T, bits) if format == "gptq_v2" else v1_zeros(zeros.T, bits)
    qweight = pack_words(codes, bits).T
    # trap 11: rows beyond the input up to a multiple of 32 codes, whatever they hold
    short = -codes.shape[1] % 32 * bits // 32
    qweight = np.concatenate([qweight, np.full((short, codes.shape[0]), -1, dtype=np.int32)])[: -(-codes.shape[1] // 32) * bits]
    g_idx = np.arange(codes.shape[1], dtype=np.int32) // group
    return {"qweight": qweight, "qzeros": packed_zeros, "scales": scales.T.astype(np.float16), "g_idx": g_idx}


def random_checkpoint(bits: int, columns: int, group: int, format: str, lowest: int = 1, rows: int = 32) -> tuple[Any, ...]:
    dice = np.random.default_rng([bits, columns, group])
    groups = -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zeros = dice.integers(lowest, 1 << bits, (rows, groups), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    return codes, zeros, scales, checkpoint_tensors(codes, zeros, scales, bits, group, format)


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


@pytest.mark.parametrize("shape", [(64, 172), (64, 16), (16, 64)], ids=str)
def test_gptq_three_bits(shape: tuple[int, int]) -> None:
    """No 3 bits by gptqmodel unless 32 divides input and output: said at once, not after the calibration."""
    job = QuantizeJob(
        Checkpoint(Path("nowhere")), {"good": (64, 64), "bad": shape}, no_windows, QuantizeOptions(bits=3), Path("nowhere")
    )
    with pytest.raises(OptionError, match="bad"):
        gptq.quantize(job)


def test_gptq_failure_has_its_reason(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work fails in a process of its own; the user sees its last words, not an exit code alone."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'INFO noise'\necho 'RuntimeError: not enough memory for block 3' >&2\necho\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ProofError, match=r"3: RuntimeError: not enough memory for block 3$"):
        run("quantize", Artifact.load(tiny), tmp_path / "out", QuantizeOptions(method="gptq"))
    assert [p.name for p in tmp_path.iterdir()] == ["python"]


def test_calibration_windows_by_seed(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Drawn from the whole text, the same for the same seed; a .jsonl file is read as its texts."""
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": part}) for part in text.read_text().split("\n\n")))
    ids = np.concatenate([row[1:] for row in text_windows(text, tiny, budget=10**6)]).tolist()
    drawn = [text_windows(text, tiny, budget=1024, shortest=16, seed=seed) for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    firsts = [[row[1:9].tolist() for row in rows] for rows in drawn]
    assert firsts[0] != firsts[2] and len({str(f) for f in firsts[0]}) == len(drawn[0]) == 4
    places = sorted(next(i for i in range(len(ids)) if ids[i : i + 8] == first) for first in firsts[0])
    assert places[-1] > 1024  # not only from its beginning
    assert text_windows(lines, tiny, budget=1024, shortest=16, seed=1)


# --------------------------------------------------------------------------------------- GPTQ: a real run of gptqmodel

DEQUANTIZE = """
import sys
import numpy as np, torch
from gptqmodel import BACKEND, GPTQModel

model = GPTQModel.load(sys.argv[1], backend=BACKEND.TORCH, dtype=torch.float16, device="cpu")  # its kernel takes no float32
found = {}
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        module.scales.data = module.scales.data.float()  # so that the product is float32, as ours is
        found[name] = module.dequantize_weight().T.detach().numpy()
np.savez(sys.argv[2], **found)
"""


@dataclass(frozen=True)
class GptqRun:
    """scratch: what gptqmodel wrote; cwd: the working directory meanwhile; packed: what the stage made of it."""

    source: Path
    scratch: Path
    cwd: Path
    packed: Artifact
    windows: list[np.ndarray]

    @property
    def linears(self) -> dict[str, PackedLinear]:
        """What ships."""
        file = PackedFile(self.packed.path)
        return {name: file[name] for name in matrices(self.source)}

    def raw(self) -> dict[str, np.ndarray]:
        """The tensors that gptqmodel wrote."""
        return {k: v for shard in (self.scratch / "model").glob("*.safetensors") for k, v in load_file(shard).items()}

    def dequantized(self) -> dict[str, np.ndarray]:
        """Weights restored by gptqmodel itself, in a process of its own."""
        command = [sys.executable, "-c", DEQUANTIZE, str(self.scratch / "model"), str(self.scratch / "weights.npz")]
        subprocess.run(command, check=True, capture_output=True, timeout=600, cwd=self.scratch)
        with np.load(self.scratch / "weights.npz") as arrays:
            return dict(arrays)


def run_gptq(source: Path, folder: Path, text: Path, **options: Any) -> GptqRun:
    folder.mkdir(exist_ok=True)
    cwd, scratch = folder / "cwd", folder / ".packed.gptq"
    cwd.mkdir()
    settings = QuantizeOptions(method="gptq", calibration=text, **{"calibration_tokens": 2048, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(isolated, "remove", lambda _: None)
        packed = run("quantize", Artifact.load(source), folder / "packed", settings)
    return GptqRun(source, scratch, cwd, packed, text_windows(text, source, budget=settings.calibration_tokens, shortest=16))


@pytest.fixture(scope="module")
def quantized(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GptqRun]:
    yield run_gptq(tiny, tmp_path_factory.mktemp("gptq"), text, bits=4, group_size=64)


def test_gptq_against_raw_words(quantized: GptqRun) -> None:
    """Every weight worked out from gptqmodel's int32 words one at a time: no code, zero point or scale was changed or moved."""
    raw = quantized.raw()
    config = json.loads((quantized.scratch / "model" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq" and config["sym"] is False
    assert len(quantized.linears) == 28
    for name, linear in quantized.linears.items():
        rows, columns = linear.shape
        codes = unpack_words(raw[f"{name}.qweight"].T, 4, columns)
        zeros = unpack_words((raw[f"{name}.qzeros"].view(np.uint32) + ones(4)).view(np.int32), 4, rows).T
        scales = raw[f"{name}.scales"].T
        assert scales.dtype == np.float16 and scales.shape == (rows, -(-columns // 64))
        expected = np.empty(linear.shape, dtype=np.float32)
        for n in range(rows):
            for k in range(columns):
                expected[n, k] = np.float32(int(codes[n, k]) - int(zeros[n, k // 64])) * np.float32(scales[n, k // 64])
        assert np.array_equal(linear.dequantized(), expected)


def test_gptq_against_gptqmodel(quantized: GptqRun) -> None:
    """The same as gptqmodel's own dequantization of its own checkpoint, array for array."""
    truth = quantized.dequantized()
    assert set(truth) == set(quantized.linears)
    assert all(np.array_equal(linear.dequantized(), truth[name]) for name, linear in quantized.linears.items())


def test_gptq_reads_float32(quantized: GptqRun) -> None:
    """Trap 7: gptqmodel would load bfloat16 by itself. The scales of a row's first group tell, which no other group moved.

    They are stored as float16 (5e-4 at most); the range of weights that were rounded to bfloat16 before is off by up to 4e-3.
    """
    raw, worst = quantized.raw(), 0.0
    for name, weight in matrices(quantized.source).items():
        first = weight[:, :64]
        span = np.maximum(first.max(1), 0) - np.minimum(first.min(1), 0)
        worst = max(worst, float(np.abs(raw[f"{name}.scales"][0].astype(np.float32) * 15 / span - 1).max()))
    assert worst < 6e-4


def test_gptq_records_what_it_used(quantized: GptqRun) -> None:
    """The calibration tokens of the manifest are those that were asked for and used."""
    (step,) = quantized.packed.steps
    assert step.facts["calibration_positions"] == sum(map(len, quantized.windows)) <= 2048 + len(quantized.windows)
    given = json.loads((quantized.scratch / "job.json").read_text())["windows"]
    assert given == [row.tolist() for row in quantized.windows]
    ids = np.concatenate(quantized.windows)
    assert step.facts["calibration"]["sha256_of_ids"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert step.facts["calibration"]["token_budget"] == 2048
    assert step.facts["padded"]["model.layers.0.mlp.down_proj"] == 32


def test_gptq_leaves_nothing_behind(quantized: GptqRun) -> None:
    """Logs of gptqmodel land where it stands; a user's working directory is not the place for them."""
    assert [p.name for p in quantized.cwd.rglob("*")] == []


def test_gptq_beats_rounding(quantized: GptqRun) -> None:
    """Its purpose: less error in what the matrices put out on the calibration text, at the same bits and group."""
    model = load_model(quantized.source)
    squares: dict[str, np.ndarray] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, 1).double()
            squares[name] = squares.get(name, 0) + (x.T @ x).numpy()

        return hook

    for name, module in block_linears(model).items():
        module.register_forward_pre_hook(collect(name))
    with torch.inference_mode():
        for rows in (row[None] for row in quantized.windows):
            model(input_ids=torch.from_numpy(rows), use_cache=False)

    def error(linear: PackedLinear, weight: np.ndarray) -> float:
        lost = linear.dequantized().astype(np.float64) - weight
        return float(np.trace(lost @ squares[linear.name] @ lost.T) / np.trace(weight @ squares[linear.name] @ weight.T))

    ratios = {
        name: error(quantized.linears[name], weight) / error(round_to_nearest(name, weight, 4, 64, False), weight)
        for name, weight in matrices(quantized.source).items()
    }
    assert np.mean(list(ratios.values())) < 0.9, ratios
    assert max(ratios.values()) < 1.1, ratios


def off_by_one(linear: PackedLinear) -> PackedLinear:
    """Zero points read as the other format's."""
    zeros = np.full(linear.scales.shape, 1 << (linear.bits - 1)) if linear.zeros is None else linear.zeros
    return dataclasses.replace(linear, zeros=((zeros.astype(int) + 1) % (1 << linear.bits)).astype(np.uint8))


def in_wrong_order(linear: PackedLinear) -> PackedLinear:
    """Rows of act-order put back elsewhere."""
    return dataclasses.replace(linear, permutation=np.roll(np.arange(linear.shape[1]), 1).astype(np.int32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("fault", [off_by_one, in_wrong_order])
def test_gptq_codes_read_wrongly_are_caught(
    fault: Callable[[PackedLinear], PackedLinear], bits: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back from GPTQ must be near what rounding gives, or the stage says which matrix is wrong and writes nothing."""
    wrong = "model.layers.2.self_attn.v_proj"

    def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
        found = rtn.quantize(job)
        return found | ({wrong: fault(found[wrong])} if spoil else {})

    monkeypatch.setattr("edgepress.pipeline.quantize.pack.load", lambda _: quantize)
    monkeypatch.setattr("edgepress.pipeline.quantize.proof._ROWS_PROVEN", 16)  # of 32 to 96
    options = QuantizeOptions(method="gptq", bits=bits, group_size=32)
    (tmp_path / "out").mkdir()
    spoil = False
    quantize_checkpoint(Artifact.load(tiny), tmp_path / "out", options, tmp_path / "scratch")
    spoil = True
    with pytest.raises(ProofError, match=rf"^{re.escape(wrong)} came back from gptq"):
        quantize_checkpoint(Artifact.load(tiny), tmp_path / "out", options, tmp_path / "scratch")


# What a user's terminal does: start the stage in a process, and end that process alone, without a word.
STAGE = """
import sys
from pathlib import Path
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
source, out, text = map(Path, sys.argv[1:])
options = QuantizeOptions(method="gptq", calibration=text, calibration_tokens=2048, bits=4, group_size=64)
run("quantize", Artifact.load(source), out, options)
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a dead one that nobody has asked after counts as gone)."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


LOST = {
    "another family": ("mistral", {}, " (gptqmodel can resume only llama and qwen3_moe, and this is mistral)"),
    "bits by module": ("llama", {"model.layers.0.mlp.up_proj": 8}, " (--bits-for cannot be resumed)"),
    "before the first layer": ("llama", {}, ""),
}


@pytest.mark.parametrize("case", LOST)
def test_gptq_that_cannot_go_on_says_so(
    case: str,
    tiny: Path,
    copy_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed outright it could say nothing: the same command says, when it begins anew, what is lost and why."""
    family, exceptions, because = LOST[case]
    job = job_of(copy_of(tiny, model_type=family), lambda: [np.arange(16)])
    job = dataclasses.replace(job, scratch=tmp_path / "scratch", exceptions=exceptions)
    caplog.set_level("INFO", "edgepress")
    for _ in range(2):
        monkeypatch.setattr(gptq, "_run", lambda settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gptq.quantize(job)
    assert caplog.messages == [f"quantize: GPTQ starts over, its progress before the interruption is lost{because}"]
    (tmp_path / "scratch" / "checkpoint").mkdir()
    (tmp_path / "scratch" / "checkpoint" / "CURRENT").touch()
    with pytest.raises(ZeroDivisionError):
        gptq.quantize(job)
    assert "resumes after the last layer" in caplog.messages[-1]


def test_gptq_that_ends_early_says_what_is_lost(
    tiny: Path, copy_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through both processes: the reason is known in the one that dies, and said by the other."""
    end = "import os; from edgepress.pipeline.quantize import gptq; gptq._run = lambda settings: os._exit(9)\n"
    monkeypatch.setattr(isolated, "CHILD", end + isolated.CHILD)
    caplog.set_level("INFO", "edgepress")
    with pytest.raises(ProofError, match="exit code 9"):
        run("quantize", Artifact.load(copy_of(tiny, model_type="mistral")), tmp_path / "out", QuantizeOptions(method="gptq"))
    lost = "lost (gptqmodel can resume only llama and qwen3_moe, and this is mistral)"
    assert caplog.messages[-1] == f"quantize: the progress of gptq so far is {lost}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_gptq_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint is kept, but not one whose result failed its proof: it would fail again."""
    caplog.set_level("INFO", "edgepress")
    (tmp_path / "x" / "checkpoint").mkdir(parents=True)
    (tmp_path / "x" / "checkpoint" / "CURRENT").touch()
    isolated.leave(tmp_path / "x", "gptq", isolated.Begun(28, gptq.CHECKPOINT), resumable=True)
    assert (tmp_path / "x").exists() and "is kept in" in caplog.messages[-1]
    isolated.leave(tmp_path / "x", "gptq", isolated.Begun(28, gptq.CHECKPOINT), resumable=False)
    assert not (tmp_path / "x").exists() and len(caplog.messages) == 1


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="finds the child in /proc")
@pytest.mark.families
def test_gptq_killed_outright_goes_on_and_leaves_no_process(quantized: GptqRun, tiny: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL cannot be caught: the child must see for itself that its parent is gone, and the layers done are not lost.

    The resumed result is that of an uninterrupted run, array for array.
    """
    out, scratch = tmp_path / "packed", tmp_path / ".packed.gptq"
    command = [sys.executable, "-c", STAGE, *map(str, (tiny, out, text))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (scratch / "checkpoint" / "CURRENT").is_file() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
    assert children and (scratch / "checkpoint" / "CURRENT").is_file() and not out.exists()
    deadline = time.monotonic() + 20
    while any(alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in children)

    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    resumed = PackedFile(out)
    for name, linear in quantized.linears.items():
        for part in ("codes", "scales", "zeros"):
            assert np.array_equal(getattr(resumed[name], part), getattr(linear, part)), (name, part)


def test_gptq_by_module_and_in_act_order(tiny: Path, text: Path, tmp_path: Path) -> None:
    """--bits-for and --act-order reach gptqmodel: widths, permutations and what stays float are as asked."""
    done = run_gptq(
        tiny, tmp_path, text, group_size=32, act_order=True, bits_for=("model.layers.0.mlp.*=8", "model.layers.1.*=16"),
        calibration_tokens=512,
    )  # fmt: skip
    file = PackedFile(done.packed.path)
    body = {name: file[name] for name in file if ".layers." in name}
    assert {name for name, linear in body.items() if linear.bits == 8} == {
        f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert len(body) == 21 and not [name for name in body if ".layers.1." in name]
    assert all(linear.permutation is not None for linear in body.values())
    q, k, v = (body[f"model.layers.2.self_attn.{x}_proj"].permutation for x in "qkv")
    assert np.array_equal(q, k) and np.array_equal(q, v)  # one input, one Hessian diagonal, one order: one operator in ONNX
    assert max(done.packed.steps[-1].facts["relative_error"].values()) < 0.2


@pytest.mark.families
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, False), (3, 32, False), (4, 32, False), (4, 128, True), (8, 64, False)], ids=str
)
def test_gptq_layouts(
    tmp_path: Path, text: Path, random_model: Callable[..., Path], bits: int, group: int, symmetric: bool
) -> None:
    """Each width, groups that do not divide 172 (gptqmodel pads its rows, trap 11), and zero points of 0 (common at 2 bits)."""
    width = 192 if bits == 3 else 172
    config = LlamaConfig(
        vocab_size=5120, hidden_size=64, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    done = run_gptq(random_model(config, tmp_path / "model"), tmp_path, text, bits=bits, group_size=group, symmetric=symmetric)
    truth = done.dequantized()
    assert len(truth) == 14
    wrong = [name for name, linear in done.linears.items() if not np.array_equal(linear.dequantized(), truth[name])]
    assert not wrong, f"{len(wrong)} of 14: {wrong}"
    assert all((linear.zeros is None) == symmetric for linear in done.linears.values())


@pytest.mark.families
def test_gptq_beats_rounding_on_a_trained_model(tmp_path: Path, shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """Perplexity of babyllama-361 on text after its calibration text, 3 bits so that the difference is far above noise."""
    folder = shared_model("babyllama-361")
    done = run_gptq(folder, tmp_path, tinystories, bits=3, group_size=32, calibration_tokens=16384)
    trained = Trained(folder, text_windows(tinystories, folder, budget=16000, skip=16384))
    whole, ours = trained.perplexity(), trained.perplexity(done.linears)
    assert whole < ours < trained.perplexity(trained.rounded(3, 32))
