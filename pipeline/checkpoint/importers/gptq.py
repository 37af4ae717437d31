"""GPTQ checkpoints: gptqmodel's, AutoGPTQ's, and those of transformers and optimum; act-order included.

qweight int32 (in * bits / 32, out) holds codes along ``in``, lower index in the lower bits; its rows may be padded.
qzeros int32 (groups, out * bits / 32) holds zero points along ``out``: format v1 ("gptq") stores zero - 1, v2 ("gptq_v2") the
zero itself. scales float16 (groups, out). g_idx int32 (in,): the group of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from edgepress.pipeline.checkpoint.layout import BLOCKS
from edgepress.pipeline.checkpoint.packed import PackedLinear, PackedMatrices
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.documents import DocumentError, typed
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject

PARTS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")
_WHOLE = (torch.int32, torch.int64)
_VOTERS = 24  # matrices that vote on the format


@dataclass(frozen=True)
class _Settings:
    """What is read of the settings, where a matrix does not show it itself. Raises ValueError for what GPTQ does not know."""

    group_size: int = -1
    bits: Literal[2, 3, 4, 8] = 4

    def __post_init__(self) -> None:
        if self.group_size != -1 and not 0 < self.group_size <= 1 << 20:
            raise ValueError(f"a group_size of {self.group_size}")


class GptqFolder(PackedMatrices):
    """The packed matrices of a GPTQ folder.

    Bits and group size are read from the arrays of each matrix, not from the config: they may differ from one to the next.
    transformers replaces the linear modules of the blocks alone, so a head is read as float wherever there is one.
    format: how zero points are stored, where the caller knows it; else it is decided by the values, because labels lie.
    """

    leaves_head_float = True

    def __init__(
        self,
        folder: Path,
        index: ShardIndex,
        settings: JsonObject,
        original: Callable[[str], np.ndarray | None] | None = None,
        format: str | None = None,
    ) -> None:
        names = index.names
        super().__init__(name.removesuffix(".qweight") for name in sorted(names) if name.endswith(".qweight"))
        self._index = index
        try:
            self._settings = typed(_Settings, settings, "quantization_config")
        except DocumentError as error:
            raise ModelError(f"{folder} has damaged settings ({error}); correct them or give the original checkpoint") from error
        if not self._modules:
            raise ModelError(f"{folder} claims to be GPTQ but holds no GPTQ matrix; give the complete checkpoint")
        parts = {f"{module}.{part}": module for module in self._modules for part in PARTS}
        self.parts = {name: module for name, module in parts.items() if name in names}
        self.format, evidence = (format, "known") if format else self._find_format(folder, original)
        self.described = {"quant_method": "gptq", "zero_points": self.format, "zero_points_by": evidence}

    def __getitem__(self, name: str) -> PackedLinear:
        return self._read(name, self.format)

    def _read(self, name: str, format: str) -> PackedLinear:
        arrays = {part: self._array(f"{name}.{part}", part) for part in ("qweight", "qzeros", "scales")}
        words, rows = arrays["qweight"].shape
        length = self._settings.group_size
        if f"{name}.g_idx" in self.parts:
            order = self._array(f"{name}.g_idx", "g_idx").astype(np.int64)
            counts = np.bincount(order) if order.size and order.min() >= 0 else np.zeros(1, np.int64)
            # the length of a group, where there are several, stands in g_idx
            if counts.size > 1:
                length = int(counts.max())
            elif length not in BLOCKS:
                length = -1
        else:  # AutoGPTQ before 0.3
            columns = words * 32 // self._settings.bits
            order = np.zeros(columns, np.int64) if length == -1 else np.arange(columns) // length
        if not rows or not order.size:
            raise ModelError(f"{name} is an empty matrix; give the complete checkpoint")
        bits = width(name, words, order.size)
        return convert(name, (rows, order.size), arrays | {"g_idx": order}, bits, length, format)

    def _array(self, name: str, part: str) -> np.ndarray:
        """One array. Raises ModelError when it is missing, or not of the type and rank that GPTQ stores."""
        tensor = self._index.tensor(name)
        rank, whole = 1 if part == "g_idx" else 2, part != "scales"
        if tensor.ndim != rank or tensor.is_floating_point() == whole or (whole and tensor.dtype not in _WHOLE):
            shape = tuple(tensor.shape)
            raise ModelError(f"{name} is {tensor.dtype} {shape}, which GPTQ does not store; give the original float checkpoint")
        return np.asarray((tensor if whole else tensor.float()).numpy())

    def _find_format(self, folder: Path, original: Callable[[str], np.ndarray | None] | None) -> tuple[str, str]:
        """Format of the zero points, and what decided it. Raises ModelError when nothing does."""
        chosen = self._modules[:: max(1, len(self._modules) // _VOTERS)]
        if original is not None:
            weights = {name: weight for name in chosen if (weight := original(name)) is not None}
            if not weights:
                raise ModelError(f"the folder given as --original lacks {chosen[0]}.weight; give the checkpoint that was quantized")
            votes: list[str | None] = [self._nearest(name, weight) for name, weight in weights.items()]
            source = "the original weights"
        else:
            votes = [self._plausible(name) for name in chosen]
            source = "the values"
        for format in FORMATS:
            if votes.count(format) >= 0.9 * len(votes):
                return format, source
        raise ModelError(
            f"the zero points of {folder} are ambiguous (format v1 or v2); give the float checkpoint that it was made from "
            "with --original DIR"
        )

    def _nearest(self, name: str, weight: np.ndarray) -> str:
        """The format that restores the original weights (out, in) best. Raises ModelError when neither restores them."""
        errors = {}
        for format in FORMATS:
            restored = self._read(name, format).dequantized()
            if restored.shape != weight.shape:
                raise ModelError(
                    f"{name} is {restored.shape} here and {weight.shape} in --original; give the checkpoint that was quantized"
                )
            errors[format] = float(np.linalg.norm(restored - weight)) / (float(np.linalg.norm(weight)) or 1.0)
        best = min(errors, key=lambda format: errors[format])
        if errors[best] > 0.9:  # an unrelated matrix is 1 or more away
            raise ModelError(f"{name} is not what --original was quantized to; give the checkpoint that this one was made from")
        return best

    def _plausible(self, name: str) -> str | None:
        """The format by the zero points themselves, None when they are ambiguous.

        Symmetric ones are all 2^(bits-1), so stored as that or one less. Else: the weights of a matrix average to about
        nothing, and the wrong reading moves every one of them by a whole step.
        """
        read = {format: self._read(name, format) for format in FORMATS}
        for format, linear in read.items():
            if linear.zeros is None:
                return format
        means = {format: abs(_mean_step(linear)) for format, linear in read.items()}
        best = min(means, key=lambda format: means[format])
        return best if means[best] < 0.25 else None


def _mean_step(linear: PackedLinear) -> float:
    """Average of code - zero point over a matrix."""
    assert linear.zeros is not None
    columns = linear.shape[1]
    lengths = np.full(linear.groups, linear.group_size)
    lengths[-1] -= linear.groups * linear.group_size - columns
    return float(linear.unpacked().mean() - (linear.zeros * lengths).sum(1).mean() / columns)


def width(name: str, words: int, columns: int) -> int:
    """Bits of a code, from the int32 words that hold ``columns`` of them (and what they were padded to).

    Read from the file because a folder's one "bits" is not that of every matrix. Raises ModelError when no width fits.
    """
    padded = -(-columns // 32)
    for bits in (2, 3, 4, 8):
        if words in (padded * bits, -(-columns * bits // 32)):
            return bits
    raise ModelError(f"{name}: {words} words cannot hold {columns} codes of 2, 3, 4 or 8 bits; replace the checkpoint")


def convert(
    name: str, shape: tuple[int, int], tensors: dict[str, np.ndarray], bits: int, group_size: int, format: str
) -> PackedLinear:
    """GPTQ tensors to PackedLinear, code for code.

    Where the rows are not in order of their groups (act-order) they are sorted by group, stably, and ``permutation`` holds
    where each came from: an operator with both g_idx and packed zero points would ignore the zero points.
    group_size -1: one group. Raises ModelError for a layout that is not known.
    """
    rows, columns = shape
    length = columns if group_size == -1 else group_size
    order = np.argsort(tensors["g_idx"], kind="stable")
    if not np.array_equal(tensors["g_idx"][order], np.arange(columns) // length):
        raise ModelError(f"{name}: its g_idx does not put {length} rows in every group; give the original float checkpoint")
    if format not in FORMATS:
        raise ModelError(f"{name}: checkpoint format '{format}' is not known; give the original float checkpoint")
    groups = -(-columns // length)
    if tensors["scales"].shape != (groups, rows) or tensors["qzeros"].shape != (groups, -(-rows * bits // 32)):
        shapes = f"scales {tensors['scales'].shape} and qzeros {tensors['qzeros'].shape}"
        raise ModelError(f"{name}: {shapes} do not fit {groups} groups of {rows} rows at {bits} bits; replace the checkpoint")
    in_order = np.array_equal(order, np.arange(columns))
    codes = unpack_int32(tensors["qweight"].T, bits)[:, :columns]
    zeros = unpack_zeros(tensors["qzeros"], bits, format)[:, :rows].T
    scales = tensors["scales"].astype(np.float32).T
    symmetric = bool((zeros == 1 << (bits - 1)).all())  # the middle, which none means
    return PackedLinear.from_codes(
        name,
        codes if in_order else codes[:, order],
        scales,
        None if symmetric else np.ascontiguousarray(zeros),
        bits,
        group_size,
        None if in_order else order.astype(np.int32),
    )


def unpack_zeros(stored: np.ndarray, bits: int, format: str) -> np.ndarray:
    """Zero points uint8 (groups, out or a little more) from qzeros."""
    if format == "gptq_v2":
        return unpack_int32(stored, bits)
    if bits == 3:  # fields run across words here, and the writer took 1 from each of them
        return (unpack_int32(stored, bits) + np.uint8(1)) & np.uint8(7)
    # v1 was written by taking 1 from every field of the whole word: a zero point of 0 borrowed from the field above
    # it, so the 1s must be added to the whole word as well.
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return unpack_int32((stored.view(np.uint32) + ones).view(np.int32), bits)


def unpack_int32(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis of int32 words, lower bits first, as uint8. 3-bit codes run across the words."""
    words = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape[:-1], -1)  # little endian: low byte first
    if bits == 8:
        return words
    stream = np.unpackbits(words, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]
