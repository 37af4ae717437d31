"""Scales in two bytes on disk: float16 in the file, float32 for the operator.

MatMulNBits wants scales of the type of its activations, and on a CPU those are float32: half a bit of every weight in blocks of 64,
and a whole one in blocks of 32. The file keeps float16 and a Cast, which onnxruntime computes once, when it loads the graph
(constant folding), so that the kernel sees what it saw before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from edgepress.pipeline.checkpoint.packed import fit_half

CAST = ".float32"  # what the operator reads is called after the initializer
_SCALES = {"MatMulNBits": 2, "GatherBlockQuantized": 2, "MatMulBnb4": 2}  # operator -> which of its inputs


def keep_scales_in_half(model: ir.Model) -> None:
    """Store every float32 array of scales as float16, where that changes none of its numbers."""
    graph = model.graph
    for node in list(graph):
        place = _SCALES.get(node.op_type)
        value = node.inputs[place] if place is not None else None
        if value is None or not value.is_initializer() or value.const_value is None:
            continue
        scales = value.const_value.numpy()
        if scales.dtype != np.float32 or not fit_half(scales):
            continue
        assert value.name
        half = ir.Value(name=value.name, const_value=ir.Tensor(scales.astype(np.float16), name=value.name))
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{value.name}{CAST}")
        cast.outputs[0].name, cast.outputs[0].type = f"{value.name}{CAST}", ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(node, cast)
        for reader, index in list(value.uses()):
            reader.replace_input_with(index, cast.outputs[0])
        del graph.initializers[value.name]
        graph.register_initializer(half)
