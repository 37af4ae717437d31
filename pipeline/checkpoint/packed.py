"""PackedLinear: one quantized matrix, in the layout that the ONNX operators read. Quantizers return it, exporters read it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from edgepress.pipeline.checkpoint.layout import BLOCKS, PackedRow, check_arrays
from edgepress.pipeline.checkpoint.planes import PLANES, file_bytes, operator_bits
from edgepress.pipeline.checkpoint.shards import PACKED, ShardIndex
from edgepress.pipeline.documents import DocumentError, parse_json, typed
from edgepress.pipeline.errors import ModelError, OptionError, OutputError
from edgepress.pipeline.files import JsonObject

# Dettmers et al. 2023 (QLoRA), appendix E, and bitsandbytes' FP4, in the order of their codes.
# The tests compare both with bitsandbytes' own tables.
CODEBOOKS = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        dtype=np.float32,
    ),
    "fp4": np.array(
        [
            0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
            0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
        ],
        dtype=np.float32,
    ),
}  # fmt: skip
FEW_BITS = 4  # of the rows of a head that seldom matter
MOST_PARTS, LEAST_ROWS = 8, 16  # that a matrix is split into, and rows of each
SCALE_BYTES = 2  # of one in the file
LEAST_HALF = np.float32(2**-16)  # below it float16 has fewer than eight bits of a number left
_SAME = np.float32(1 - 2**-22)  # two of float32's steps: a scale that was one of float16 stays that one
_ROWS = 256  # of a matrix dequantized at a time: several times as fast while the steps stay in the processor's cache


@dataclass(frozen=True)
class PackedLinear:
    """A matrix of shape (out, in) as integer codes.

    Without codebook, groups lie along ``in`` and the last is padded with the code that means zero:
        codes   uint8 (out, groups, group_size * bits / 8), lower k in the lower bits (``B`` of MatMulNBits)
        scales  float32 (out, groups), numbers of float16 (``in_half``) wherever we chose them
        zeros   uint8 (out, groups), one zero point each; None means 2 ** (bits - 1)
        weight = (code - zero) * scale
    Codes of 3, 5 and 6 bits are one a byte here; the graph has them in planes (``planes.py``).

    Rows of 8 bits whose codes and zero points would fit into 4 are stored in the graph as such, where many follow one another
    (``by_bits``): how a head has few bits for the tokens that are seldom likely.

    permutation int32 (in,), or None: act-order. Column k of the codes is column permutation[k] of the matrix, so that
    ``weight @ x`` is the codes' matrix times ``x[permutation]``. Groups lie along the permuted columns.

    With codebook ("nf4", "fp4"), groups run over the flattened matrix (``B`` of MatMulBnb4):
        codes   uint8 (ceil(out * in / 2),), even index in the high nibble
        scales  float32 (ceil(out * in / group_size),), the absmax of each group
        weight = codebook[code] * scale

    A matrix that the checkpoint stores as (in, out), as GPT-2's Conv1D does, is (out, in) here. Biases stay with the float
    weights of the checkpoint.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    codebook: Literal["nf4", "fp4"] | None = None
    permutation: np.ndarray | None = None

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.shape[1] // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, packed zero points and permutation, as the graph stores them.

        Scales that are numbers of float16 are stored as such.
        """
        if len(parts := by_bits(self)) > 1:
            return sum(part.nbytes for _, part in parts)
        codes, zeros = self.as_read()
        order = 0 if self.permutation is None else self.permutation.nbytes
        stored = sum(file_bytes(read.size, self.bits) for read in (codes, zeros) if read is not None)
        return stored + self.scales.nbytes // (2 if fit_half(self.scales) else 1) + order

    def as_read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes and packed zero points, uint8, as the operator of ``operator_bits`` reads them."""
        if self.bits not in PLANES:
            return self.codes, None if self.zeros is None else pack_bits(self.zeros, self.bits)
        bits = operator_bits(self.bits)  # whose zero point is not what none means here
        zeros = np.full(self.scales.shape, 1 << (self.bits - 1), np.uint8) if self.zeros is None else self.zeros
        return pack_bits(self.codes, bits), pack_bits(zeros, bits)

    @classmethod
    def from_codes(
        cls,
        name: str,
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        bits: int,
        group_size: int,
        permutation: np.ndarray | None = None,
    ) -> PackedLinear:
        """Pack integer codes (out, in), their columns in permuted order if there is one; scales and zeros are (out, groups).

        group_size: of any length, -1 for one group a row. A length that no operator carries is stored as shorter blocks with
        the scale and zero point of their group repeated. Raises OptionError when no block divides it.
        """
        rows, columns = codes.shape
        block = block_for(group_size, columns)
        if block != group_size:
            group = np.arange(0, columns, block) // (columns if group_size == -1 else group_size)
            scales, zeros, group_size = scales[:, group], None if zeros is None else zeros[:, group], block
        groups = -(-columns // group_size)
        padded = np.empty((rows, groups * group_size), dtype=np.uint8)
        padded[:, :columns] = codes
        # A padded weight must mean zero, or an operator that reads it adds noise.
        last_zero = np.full(rows, 1 << (bits - 1), dtype=np.uint8) if zeros is None else zeros[:, -1]
        padded[:, columns:] = last_zero[:, None]
        packed = pack_bits(padded.reshape(rows, groups, group_size), bits)
        scales = np.ascontiguousarray(scales, dtype=np.float32)
        return cls(name, (rows, columns), bits, group_size, packed, scales, zeros, permutation=permutation)

    @classmethod
    def stacked(cls, parts: Sequence[PackedLinear]) -> PackedLinear:
        """One matrix of several, whose rows follow one another: of one width, form and order, without codebook."""
        first, rows = parts[0], sum(part.shape[0] for part in parts)
        codes, scales = (np.concatenate([getattr(part, field) for part in parts]) for field in ("codes", "scales"))
        zeros = None if first.zeros is None else np.concatenate([part.zeros for part in parts if part.zeros is not None])
        return replace(first, shape=(rows, first.shape[1]), codes=codes, scales=scales, zeros=zeros)

    def rows(self, some: slice) -> PackedLinear:
        """A matrix of some of the rows, without codebook."""
        codes, zeros = self.codes[some], None if self.zeros is None else self.zeros[some]
        return replace(self, shape=(len(codes), self.shape[1]), codes=codes, scales=self.scales[some], zeros=zeros)

    def in_blocks(self, block: int) -> PackedLinear:
        """The same codes in other blocks, for a matrix whose rows have one scale each. block: must divide its width."""
        scales, zeros = (x if x is None else x[:, :1].repeat(self.shape[1] // block, 1) for x in (self.scales, self.zeros))
        assert scales is not None
        return self.from_codes(self.name, self.unpacked(), scales, zeros, self.bits, block)

    def unpacked(self) -> np.ndarray:
        """The integer codes, uint8 (out, in), columns in the order in which they are stored."""
        rows, columns = self.shape
        if self.codebook:
            codes = np.stack([self.codes >> 4, self.codes & 15], axis=-1).reshape(-1)
            return np.array(codes[: rows * columns]).reshape(rows, columns)
        codes = unpack_bits(self.codes, self.bits, self.group_size)
        return np.array(codes.reshape(rows, -1)[:, :columns])

    def dequantized(self) -> np.ndarray:
        """The weights that the codes stand for, float32 (out, in)."""
        if self.codebook:
            flat = CODEBOOKS[self.codebook][self.unpacked()].reshape(-1)
            return np.asarray(flat * np.repeat(self.scales, self.group_size)[: flat.size]).reshape(self.shape)
        weights = np.empty(self.shape, dtype=np.float32)
        for first in range(0, self.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            values = unpack_bits(self.codes[rows], self.bits, self.group_size).astype(np.float32)  # (rows, groups, group_size)
            values -= np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[rows].astype(np.float32)[..., None]
            values *= self.scales[rows][..., None]
            weights[rows] = values.reshape(len(values), -1)[:, : self.shape[1]]
        if self.permutation is None:
            return weights
        restored = np.empty_like(weights)
        restored[:, self.permutation] = weights
        return restored


def in_half(scales: np.ndarray, up: bool = False, largest: float = 0.0) -> np.ndarray:
    """Scales rounded to numbers of float16, still float32.

    A quantizer rounds its scales before it finds the codes, so that the codes make up for it. Those that float16 would lose more
    than 0.4 % of become the least that it would not, where others are sixteen times as large: a group of weights of next to nothing
    must not cost its matrix two bytes a scale. Where all are small they stay as they are. up: to none that is smaller, so that as
    many steps reach as far, but for what float32 itself rounds. largest: a scale that others of their matrix reach. A group of
    zeros, which any scale will do, counts as small with LEAST_HALF.
    """
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
        half = (np.where(half < scales * _SAME, np.nextafter(half, np.float16(np.inf)), half) if up else half).astype(np.float32)
    size = np.abs(scales)
    small = np.copysign(LEAST_HALF, scales) if size.max(initial=largest) >= 16 * LEAST_HALF else scales
    return np.where(size < LEAST_HALF, small, np.where(np.isfinite(half), half, scales)).astype(np.float32)


def fit_half(scales: np.ndarray) -> bool:
    """Whether float16 holds these very numbers."""
    with np.errstate(over="ignore"):
        return np.array_equal(scales, scales.astype(np.float16))


def by_bits(linear: PackedLinear) -> list[tuple[int, PackedLinear]]:
    """A matrix of 8 bits as matrices of 8 and of 4, and the row at which each begins; of another kind as one, from row 0.

    A matrix of 8 bits whose zero points are all 128 has none stored.
    """
    if linear.bits != 8 or linear.codebook or linear.zeros is None or linear.permutation is not None:
        return [(0, linear)]
    few = np.maximum(linear.codes.reshape(len(linear.codes), -1).max(1), linear.zeros.max(1)) < 1 << FEW_BITS
    begins = [0, *(np.flatnonzero(few[1:] != few[:-1]) + 1).tolist(), len(few)]
    if len(begins) < 3 or len(begins) > MOST_PARTS + 1 or np.diff(begins).min() < LEAST_ROWS:
        return [(0, linear)]
    return [(first, _with_bits(linear.rows(slice(first, last)), bool(few[first]))) for first, last in pairwise(begins)]


def _with_bits(rows: PackedLinear, few: bool) -> PackedLinear:
    if few:
        return replace(rows, bits=FEW_BITS, codes=pack_bits(rows.codes, FEW_BITS))
    assert rows.zeros is not None
    return replace(rows, zeros=None) if (rows.zeros == 1 << (rows.bits - 1)).all() else rows


def with_few_bits(linear: PackedLinear, few: PackedLinear, where: Sequence[slice]) -> PackedLinear:
    """The matrix of 8 bits with the rows of one of 4 in the place of its own. few: its rows in order; where: in ``linear``."""
    codes, scales = linear.codes.copy(), linear.scales.copy()
    zeros = np.full(scales.shape, 1 << (linear.bits - 1), np.uint8) if linear.zeros is None else linear.zeros.copy()
    middle = np.full(few.scales.shape, 1 << (few.bits - 1), np.uint8) if few.zeros is None else few.zeros
    taken, unpacked = 0, unpack_bits(few.codes, few.bits, few.group_size)
    for rows in where:
        some = slice(taken, taken + rows.stop - rows.start)
        codes[rows], scales[rows], zeros[rows] = unpacked[some], few.scales[some], middle[some]
        taken = some.stop
    return replace(linear, codes=codes, scales=scales, zeros=zeros)


def block_for(group_size: int, columns: int) -> int:
    """The operator's block for groups of a length, -1 for whole rows: the longest that divides it.

    A whole row takes the block that costs fewest bytes at 4 bits, padding and repeated scales counted. Raises OptionError.
    """
    if group_size == -1:
        return min(BLOCKS, key=lambda block: -(-columns // block) * (block // 2 + SCALE_BYTES))
    for block in BLOCKS:
        if group_size % block == 0:
            return block
    raise OptionError(f"no operator carries groups of {group_size}; use a multiple of 16")


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis, lower index in the lower bits; a short last byte is filled with zeros.

    Codes of ``PLANES`` stay one a byte.
    """
    if bits == 8 or bits in PLANES:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), dtype=np.uint8)], axis=-1)
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(parts.shape[:-1], dtype=np.uint8)
    for index in range(per_byte):
        packed |= parts[..., index] << np.uint8(bits * index)
    return packed


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of pack_bits: the first ``count`` codes of the last axis."""
    if bits == 8 or bits in PLANES:
        return packed[..., :count]
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), dtype=np.uint8)
    for index in range(per_byte):
        codes[..., index::per_byte] = (packed >> np.uint8(bits * index)) & np.uint8((1 << bits) - 1)
    return codes[..., :count]


def save(linears: dict[str, PackedLinear], folder: Path) -> None:
    """Write ``packed.safetensors``; the non-array fields go into its metadata."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays, described = {}, {}
    for name, linear in linears.items():
        arrays[f"{name}.codes"], arrays[f"{name}.scales"] = linear.codes, linear.scales
        if linear.zeros is not None:
            arrays[f"{name}.zeros"] = np.ascontiguousarray(linear.zeros)
        if linear.permutation is not None:
            arrays[f"{name}.permutation"] = np.ascontiguousarray(linear.permutation)
        described[name] = {
            "shape": list(linear.shape), "bits": linear.bits, "group_size": linear.group_size, "codebook": linear.codebook
        }  # fmt: skip
    try:
        save_file(arrays, folder / PACKED, metadata={"linears": json.dumps(described)})
    except SafetensorError as error:
        raise OutputError(
            f"cannot write {folder / PACKED} ({error}); free some disk space or choose another output folder"
        ) from error


_STORED = {"U8": np.uint8, "I32": np.int32, "F32": np.float32}


class PackedMatrices(Mapping[str, PackedLinear]):
    """Module name -> PackedLinear of a folder, read one at a time so that a big model never stands in memory whole.

    parts: name among the folder's float tensors -> the module whose packed matrix it belongs to. codes: those of them that hold
    codes, whatever their type. leaves_head_float: whether the output head is never among them. described: what the manifest
    records of a folder that another library quantized; None for ours.
    """

    parts: Mapping[str, str] = MappingProxyType({})
    codes: AbstractSet[str] = frozenset()
    leaves_head_float = False
    described: JsonObject | None = None

    def __init__(self, modules: Iterable[str]) -> None:
        self._modules = list(modules)
        self._known = frozenset(self._modules)

    @abstractmethod
    def __getitem__(self, module: str) -> PackedLinear:
        """Read one matrix. Raises ModelError when it is damaged."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, module: object) -> bool:
        return module in self._known


class PackedFile(PackedMatrices):
    """Our own packed matrices. They have a file to themselves, so there are no parts among the float tensors."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PACKED
        if not self.path.is_file():
            raise ModelError(f"{folder} has no {PACKED}; give the complete folder, or build it again")
        self._index = ShardIndex([self.path])
        described = (self._index.headers[0].metadata or {}).get("linears", "")
        try:
            self._described = typed(dict[str, PackedRow], parse_json(described), "linears")
        except DocumentError as error:
            raise ModelError(f"{self.path} is damaged (how it describes its matrices: {error}); build that folder again") from error
        super().__init__(self._described)

    def __getitem__(self, name: str) -> PackedLinear:
        row = self._described[name]
        parts = ("codes", "scales", *(part for part in ("zeros", "permutation") if f"{name}.{part}" in self._index))
        arrays = {part: self._array(f"{name}.{part}") for part in parts}
        try:
            check_arrays(row, arrays)
        except ValueError as error:
            raise ModelError(f"{self.path} is damaged ({name}: {error}); build that folder again") from error
        return PackedLinear(name, row.shape, row.bits, row.group_size, codebook=row.codebook, **arrays)

    def _array(self, name: str) -> np.ndarray:
        if name not in self._index:
            raise ModelError(f"{self.path} is damaged (it lacks {name}); build that folder again")
        entry = self._index[name]
        if entry.dtype not in _STORED:
            raise ModelError(f"{self.path} is damaged ({name} is of the type {entry.dtype}); build that folder again")
        return np.frombuffer(self._index.read(name), dtype=_STORED[entry.dtype]).reshape(entry.shape)
