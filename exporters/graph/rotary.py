"""Cosines and sines of rotary embeddings: as tables, or long ones as the products of two short ones.

Cosines and sines of 32,768 positions and 256 dimensions are 34 MB, a tenth of a small model's file, and those of (nk + m)f follow
from those of nkf and mf (addition theorem). onnxruntime multiplies them out once, when it loads the graph (constant folding).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.builder import Builder

STEP = 256  # positions of the fine table
LONG = 2**22  # bytes of a table that is worth four nodes


def rotary_values(b: Builder, suffix: str, cos: np.ndarray, sin: np.ndarray) -> list[ir.Value | None]:
    """The values (positions, half of the rotated dimensions) of a kind of rotary embedding, from float32 tables of that shape.

    A float16 graph keeps its tables: products of rounded numbers would be rounded twice.
    """
    names = f"cos_cache{suffix}", f"sin_cache{suffix}"
    if b.float != ir.DataType.FLOAT or cos.nbytes < LONG or len(cos) % STEP:
        return [b.constant(name, table) for name, table in zip(names, (cos, sin), strict=True)]
    scale = cos[0]  # position 0: what the architecture multiplies all cosines and sines by
    parts = {}
    for part, table in (("cos", cos), ("sin", sin)):
        parts[f"fine_{part}"] = b.constant(f"{part}_fine{suffix}", table[None, :STEP])
        parts[f"coarse_{part}"] = b.constant(f"{part}_coarse{suffix}", (table[::STEP] / scale)[:, None])
    shape = b.integers(*cos.shape)

    def combined(name: str, kind: str, one: tuple[str, str], other: tuple[str, str]) -> ir.Value:
        products = [b.op("Mul", [parts[f"coarse_{c}"], parts[f"fine_{f}"]], f"{name}.{c}_{f}") for c, f in (one, other)]
        return b.op("Reshape", [b.op(kind, products, f"{name}.rows"), shape], name)

    return [
        combined(names[0], "Sub", ("cos", "cos"), ("sin", "sin")),
        combined(names[1], "Add", ("sin", "cos"), ("cos", "sin")),
    ]
