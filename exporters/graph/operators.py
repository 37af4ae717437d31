"""PackedLinear as onnxruntime operators: MatMulNBits and MatMulBnb4, codes and scales exactly as the quantizer chose them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.planes import operator_bits

DOMAIN = "com.microsoft"
_BNB_TYPES = {"fp4": 0, "nf4": 1}


class Operator(NamedTuple):
    """kind: its name. inputs: its constant ones by their names in the operator's schema, in order. attributes: as in the schema."""

    kind: str
    inputs: dict[str, np.ndarray]
    attributes: dict[str, int]


def operator(linear: PackedLinear, accuracy_level: int) -> Operator:
    """The operator that computes with a packed matrix.

    MatMulNBits: B uint8 (N, ceil(K / block), block * bits / 8), scales float32 (N, blocks), zero_points uint8
    (N, ceil(blocks * bits / 8)), absent when every zero point is 2 ** (bits - 1).
    MatMulBnb4: B uint8 (ceil(N * K / 2),), absmax float32, both flat.
    The operator's own g_idx is never used: with it the CPU kernel silently ignores packed zero points, and is 30-50 times
    slower with float ones. Where the codes are permuted, the caller permutes the input instead.
    """
    rows, columns = linear.shape
    if linear.codebook:
        attributes = {"K": columns, "N": rows, "block_size": linear.group_size, "quant_type": _BNB_TYPES[linear.codebook]}
        return Operator("MatMulBnb4", {"B": linear.codes, "absmax": linear.scales}, attributes)
    codes, zeros = linear.as_read()
    inputs = {"B": codes, "scales": linear.scales}
    if zeros is not None:
        inputs["zero_points"] = zeros
    attributes = {
        "K": columns,
        "N": rows,
        "bits": operator_bits(linear.bits),
        "block_size": linear.group_size,
        "accuracy_level": accuracy_level,
    }
    return Operator("MatMulNBits", inputs, attributes)


def stacked(name: str, linears: list[PackedLinear]) -> PackedLinear | None:
    """Matrices with the same input as one, their rows in order; None when their layouts, or the orders of their input, differ.

    Groups lie along the input, so stacking rows keeps every group of codes as it is. Codebook groups run over the
    flattened matrix: they too stay whole, provided that each matrix ends on a group.
    """
    first = linears[0]
    layout = (first.shape[1], first.bits, first.group_size, first.codebook)
    if any((x.shape[1], x.bits, x.group_size, x.codebook) != layout for x in linears):
        return None
    if not all(_same_order(first.permutation, x.permutation) for x in linears):
        return None
    if first.codebook and any(x.shape[0] * x.shape[1] % x.group_size for x in linears[:-1]):
        return None
    zeros = None
    if any(x.zeros is not None for x in linears):  # a matrix without stored zero points means 2 ** (bits - 1)
        zeros = np.concatenate(
            [np.full((x.shape[0], x.groups), 1 << (x.bits - 1), np.uint8) if x.zeros is None else x.zeros for x in linears]
        )
    return PackedLinear(
        name,
        (sum(x.shape[0] for x in linears), first.shape[1]),
        first.bits,
        first.group_size,
        np.concatenate([x.codes for x in linears]),
        np.concatenate([x.scales for x in linears]),
        zeros,
        first.codebook,
        first.permutation,
    )


def _same_order(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b is None or (a is not None and b is not None and np.array_equal(a, b))
