"""The bytes that an operator reads, made of planes (pipeline/checkpoint/planes.py) by nodes over constants.

onnxruntime computes them once, when it loads the graph (constant folding), so that the kernel sees constants. Until then
each node's result is in memory: three and a half bytes for one that the operator reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from edgepress.pipeline.checkpoint.planes import PLANES, Piece, split

# What makes these nodes: of an operator, its inputs and its name (Builder.op), and a constant of a name (Builder.constant).
Op = Callable[..., ir.Value]
Constant = Callable[[str, np.ndarray], ir.Value]
MAKES_BYTES = ("BitwiseAnd", "BitShift")  # read planes


def from_planes(read: np.ndarray, bits: int, name: str, op: Op, constant: Constant) -> ir.Value:
    """What an operator reads, uint8, of which the file has the planes; where they do not divide it, it is in the file as it is."""
    row = PLANES[bits]
    whole = read if read.shape[-1] % row.parts == 0 else read.reshape(-1)
    if whole.size % row.parts:
        return constant(name, read)
    planes = [constant(f"{name}.plane{number}", plane) for number, plane in enumerate(split(whole, bits))]

    def byte(value: int) -> ir.Value:
        return constant(f"uint8.{value}", np.array(value, np.uint8))

    def piece(one: Piece, place: str) -> ir.Value:
        value, top = planes[one.plane], (0xFF >> one.shift) << one.shift
        if one.mask != top:  # a shift drops the bits below, not those above
            value = op("BitwiseAnd", [value, byte(one.mask)], f"{place}.masked")
        return op("BitShift", [value, byte(one.shift)], f"{place}.shifted", direction="RIGHT")

    parts = [op("BitwiseAnd", [plane, byte(row.mask)], f"{name}.part{number}") for number, plane in enumerate(planes)]
    for number, pieces in enumerate(row.spread, len(planes)):
        first, *others = [piece(one, f"{name}.part{number}.piece{place}") for place, one in enumerate(pieces)]
        for place, other in enumerate(others, 1):
            first = op("BitwiseOr", [first, other], f"{name}.part{number}.{place}")
        parts.append(first)
    if whole is read:
        return op("Concat", parts, name, axis=-1)
    joined = op("Concat", parts, f"{name}.flat", axis=-1)
    return op("Reshape", [joined, constant(f"{name}.shape", np.array(read.shape, np.int64))], name)
