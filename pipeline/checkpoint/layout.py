"""What packed.safetensors says of a matrix, and whether its arrays are what that calls for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from edgepress.pipeline.checkpoint.planes import PLANES

# Lengths of a block, weights with a common scale, that MatMulNBits carries.
BLOCKS = (256, 128, 64, 32, 16)
_LARGEST = 1 << 31  # rows or columns


@dataclass(frozen=True)
class PackedRow:
    """The fields of a PackedLinear that are no arrays. Raises ValueError for values that no matrix has."""

    shape: tuple[int, int]
    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: int
    codebook: Literal["nf4", "fp4"] | None = None

    def __post_init__(self) -> None:
        if not all(0 < side <= _LARGEST for side in self.shape):
            raise ValueError(f"a matrix of {self.shape[0]} x {self.shape[1]}")
        power = self.group_size >= 16 and not self.group_size & (self.group_size - 1)
        if not (power if self.codebook else self.group_size in BLOCKS):
            raise ValueError(f"groups of {self.group_size}")
        if self.codebook and self.bits != 4:
            raise ValueError(f"a codebook of {self.bits} bits")


def check_arrays(row: PackedRow, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError where an array is not of the type and shape that PackedLinear documents, or points outside of it."""
    (rows, columns), size = row.shape, row.group_size
    groups = -(-columns // size)
    wanted: dict[str, tuple[type[np.generic], tuple[int, ...]]]
    if row.codebook:
        wanted = {"codes": (np.uint8, (-(-rows * columns // 2),)), "scales": (np.float32, (-(-rows * columns // size),))}
    else:
        width = size if row.bits in PLANES else size * row.bits // 8
        wanted = {
            "codes": (np.uint8, (rows, groups, width)),
            "scales": (np.float32, (rows, groups)),
            "zeros": (np.uint8, (rows, groups)),
            "permutation": (np.int32, (columns,)),
        }
    for name, array in arrays.items():
        if name not in wanted:
            raise ValueError(f"a matrix of codebook {row.codebook} has no {name}")
        dtype, shape = wanted[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} {array.dtype} {array.shape} do not fit a matrix of {rows} x {columns}")
    if "permutation" in arrays and not np.array_equal(np.sort(arrays["permutation"]), np.arange(columns)):
        raise ValueError("its permutation is none")
    if row.bits in PLANES and arrays["codes"].max(initial=0) >> row.bits:
        raise ValueError(f"codes of more than {row.bits} bits")
    if "zeros" in arrays and arrays["zeros"].max(initial=0) >> row.bits:
        raise ValueError(f"zeros of more than {row.bits} bits")
