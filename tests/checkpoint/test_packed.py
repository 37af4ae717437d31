"""PackedLinear: the bit layout that the operators read, its file, and the two codebooks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edgepress.exporters.graph.operators import operator
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.packed import CODEBOOKS, PackedFile, PackedLinear, pack_bits, unpack_bits
from edgepress.pipeline.checkpoint.shards import PACKED
from edgepress.pipeline.errors import ModelError

BITS = (2, 3, 4, 5, 6, 8)
ONE_A_BYTE = (3, 5, 6, 8)
# (columns, group): whole groups, one short group, several groups with the last one short
LAYOUTS = [(64, 32), (172, 32), (96, 64), (64, 128)]


def random_linear(
    bits: int, columns: int, group: int, *, zeros: bool, rows: int = 5, name: str = "m"
) -> tuple[PackedLinear, np.ndarray]:
    """A packed matrix and the codes that went into it."""
    dice = np.random.default_rng([bits, columns, group, zeros])
    groups = -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
    # never the default zero point, so that mistaking one for the other shows
    points = dice.integers(0, (1 << bits) - 1, (rows, groups), dtype=np.uint8)
    points += points >= 1 << (bits - 1)
    return PackedLinear.from_codes(name, codes, scales, points if zeros else None, bits, group), codes


def random_codebook(kind: str, rows: int, columns: int, group: int = 64) -> PackedLinear:
    dice = np.random.default_rng([rows, columns, group])
    codes = dice.integers(0, 256, -(-rows * columns // 2), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, -(-rows * columns // group)).astype(np.float32)
    return PackedLinear("c", (rows, columns), 4, group, codes, scales, codebook=kind)


def naive_weights(linear: PackedLinear) -> np.ndarray:
    """One weight at a time, from the layout as the class documents it."""
    rows, columns = linear.shape
    weights = np.empty(linear.shape, dtype=np.float32)
    for n in range(rows):
        for k in range(columns):
            if linear.codebook:
                flat = n * columns + k
                byte = int(linear.codes[flat // 2])
                code = byte >> 4 if flat % 2 == 0 else byte & 15
                weights[n, k] = CODEBOOKS[linear.codebook][code] * linear.scales[flat // linear.group_size]
                continue
            group, i = divmod(k, linear.group_size)
            per_byte = 1 if linear.bits in ONE_A_BYTE else 8 // linear.bits
            code = int(linear.codes[n, group, i // per_byte]) >> (i % per_byte * linear.bits) & ((1 << linear.bits) - 1)
            zero = 1 << (linear.bits - 1) if linear.zeros is None else int(linear.zeros[n, group])
            weights[n, k] = np.float32(code - zero) * linear.scales[n, group]
    return weights


@pytest.mark.parametrize("count", [1, 3, 6, 16, 33])
@pytest.mark.parametrize("bits", BITS)
def test_bits_round_trip(bits: int, count: int) -> None:
    """Every code must come back, also where the last byte is not full (zero points of three blocks, for one)."""
    codes = np.random.default_rng(count).integers(0, 1 << bits, (4, 3, count), dtype=np.uint8)
    stored = pack_bits(codes, bits)
    assert stored.dtype == np.uint8
    assert stored.shape == (4, 3, count if bits in ONE_A_BYTE else -(-count * bits // 8))
    assert np.array_equal(unpack_bits(stored, bits, count), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "stored"),
    [(4, [0x1, 0xE, 0x5], [0xE1, 0x05]), (2, [0, 1, 2, 3, 2], [0b11100100, 0b10]), (8, [7, 255], [7, 255])],
)
def test_lower_index_lies_in_the_lower_bits(bits: int, codes: list[int], stored: list[int]) -> None:
    """The operator's order; the other one round-trips just as well and computes nonsense."""
    assert pack_bits(np.array(codes, dtype=np.uint8), bits).tolist() == stored


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("columns", "group"), LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_and_weights(bits: int, columns: int, group: int, zeros: bool) -> None:
    """Codes survive, weights are what a plain double loop gives, and padded columns stand for exactly zero."""
    linear, codes = random_linear(bits, columns, group, zeros=zeros)
    groups = -(-columns // group)
    assert linear.codes.shape == (5, groups, group if bits in ONE_A_BYTE else group * bits // 8)
    assert np.array_equal(linear.unpacked(), codes)
    assert linear.dequantized().dtype == np.float32
    assert np.array_equal(linear.dequantized(), naive_weights(linear))

    everything = unpack_bits(linear.codes, bits, group).reshape(5, groups * group)
    padded = everything[:, columns:]
    assert padded.shape[1] == groups * group - columns
    last_zero = np.full(5, 1 << (bits - 1)) if linear.zeros is None else linear.zeros[:, -1]
    assert (padded == last_zero[:, None]).all()


@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (7, 96), (5, 172), (3, 33)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebook_weights(kind: str, rows: int, columns: int) -> None:
    """Codebook groups run over the flattened matrix: across rows, with a short last group and even half a last byte."""
    linear = random_codebook(kind, rows, columns)
    assert linear.unpacked().shape == (rows, columns)
    assert np.array_equal(linear.dequantized(), naive_weights(linear))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("columns", "group"), [*LAYOUTS, (160, 32)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nbytes_are_the_operators_bytes(bits: int, columns: int, group: int, zeros: bool) -> None:
    """Sizes are reported from nbytes; they must be what the ONNX file will hold."""
    linear, _ = random_linear(bits, columns, group, zeros=zeros)
    assert linear.nbytes == sum(array.nbytes for array in operator(linear, 4)[1].values())
    groups = -(-columns // group)
    assert linear.nbytes == 5 * (groups * group * bits // 8 + groups * 4 + (-(-groups * bits // 8) if zeros else 0))


def test_nbytes_of_a_codebook() -> None:
    """Half a byte a weight and four bytes a group."""
    linear = random_codebook("nf4", 7, 96)
    assert linear.nbytes == 7 * 96 // 2 + 4 * 11 == sum(array.nbytes for array in operator(linear, 4)[1].values())


def _same(a: PackedLinear, b: PackedLinear) -> None:
    assert (a.name, a.shape, a.bits, a.group_size, a.codebook) == (b.name, b.shape, b.bits, b.group_size, b.codebook)
    assert (a.zeros is None) == (b.zeros is None)
    for one, other in [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros)]:
        if one is not None and other is not None:
            assert one.dtype == other.dtype and np.array_equal(one, other)


def test_file_round_trip(tmp_path: Path) -> None:
    """What the quantizer chose ships unchanged, in every kind of layout, and also from transposed views (GPTQ's are)."""
    kinds = [random_linear(b, c, g, zeros=z, name=f"m.{b}.{c}.{z}")[0] for b in BITS for c, g in LAYOUTS for z in (False, True)]
    dice = np.random.default_rng(1)
    codes = dice.integers(0, 16, (96, 6), dtype=np.uint8).T
    scales, zeros = dice.random((2, 6), dtype=np.float32).T, dice.integers(0, 16, (2, 6), dtype=np.uint8).T
    view = PackedLinear.from_codes("view", codes, scales, zeros, 4, 64)
    books = [random_codebook(kind, 7, columns) for kind in ("nf4", "fp4") for columns in (96, 33)]
    linears = {f"{i}.{linear.name}": linear for i, linear in enumerate([*kinds, view, *books])}
    linears = {name: PackedLinear(**{**vars(linear), "name": name}) for name, linear in linears.items()}
    packed.save(linears, tmp_path)
    file = PackedFile(tmp_path)
    assert list(file) == list(linears)
    assert "none" not in file
    for name, linear in linears.items():
        assert name in file
        _same(file[name], linear)
        assert np.array_equal(file[name].dequantized(), linear.dequantized())


def test_file_without_matrices(tmp_path: Path) -> None:
    """``--method none`` writes one; it is whole, and empty."""
    packed.save({}, tmp_path)
    assert list(PackedFile(tmp_path)) == []


DAMAGES = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:40],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "garbage": lambda data: np.random.default_rng(0).bytes(len(data)),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 20,
    "its description cut": lambda data: data.replace(b'{\\"m\\"', b'[\\"m\\"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(tmp_path: Path, damage: str) -> None:
    """A download or copy that stopped half way gets one clear line and no traceback."""
    packed.save({"m": random_linear(4, 96, 64, zeros=True)[0]}, tmp_path)
    file = tmp_path / PACKED
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert file.read_bytes() != whole
    with pytest.raises(ModelError, match=r"packed\.safetensors"):
        PackedFile(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "np"}, {"linears": "{"}])
def test_file_that_is_not_ours(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """A sound safetensors file under our name, without our description."""
    from safetensors.numpy import save_file

    save_file({"m.codes": np.zeros(4, np.uint8)}, tmp_path / PACKED, metadata=metadata)
    with pytest.raises(ModelError):
        PackedFile(tmp_path)


def test_file_is_absent(tmp_path: Path) -> None:
    """Asked for and not there: the same clear error."""
    with pytest.raises(ModelError):
        PackedFile(tmp_path)


def test_file_lacks_an_array(tmp_path: Path) -> None:
    """Described and not there: an error that names the file, wherever it shows first."""
    from safetensors.numpy import save_file

    described = {"m": {"shape": [4, 64], "bits": 4, "group_size": 64, "codebook": None}}
    save_file({"m.codes": np.zeros((4, 1, 32), np.uint8)}, tmp_path / PACKED, metadata={"linears": json.dumps(described)})
    with pytest.raises(ModelError, match=r"packed\.safetensors"):
        PackedFile(tmp_path)["m"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_are_bitsandbytes_own(kind: str) -> None:
    """The table and every weight of it, bit for bit; rows straddle groups and the last group is short.

    bitsandbytes restores a vector here: for a matrix whose rows straddle groups its AVX512 kernel (0.50.2) may be wrong.
    """
    import torch
    from bitsandbytes import functional

    torch.manual_seed(0)
    codes, state = functional.quantize_4bit(0.05 * torch.randn(37 * 172), blocksize=64, quant_type=kind)
    assert np.array_equal(state.code.numpy(), CODEBOOKS[kind])
    linear = PackedLinear("m", (37, 172), 4, 64, codes.flatten().numpy(), state.absmax.numpy(), codebook=kind)
    assert len(np.unique(linear.unpacked())) >= 15  # all codes were tried (both zeros of fp4 are one)
    assert np.array_equal(linear.dequantized(), functional.dequantize_4bit(codes, state).numpy().reshape(37, 172))
