"""The key-value cache of a fused graph in int8 instead of float, and back: the same nodes with scales and other types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

METADATA = "edgepress.cache"
# Inputs of GroupQueryAttention.
PAST, SCALES = slice(3, 5), 12
_ATTRIBUTES = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}


def attention(graph: ir.Model) -> Iterator[ir.Node]:
    """The nodes that keep a cache, in order."""
    return (node for node in graph.graph if node.op_type == "GroupQueryAttention")


def to_int8(graph: ir.Model, scales: Mapping[str, np.ndarray]) -> None:
    """Let every node keep int8. scales: name of an input of the cache -> float32 (heads, head size), of one step of a channel."""
    for node in attention(graph):
        node.resize_inputs(SCALES + 2)
        for position, past in enumerate(node.inputs[PAST]):
            assert past is not None and past.name is not None
            array = scales[past.name].astype(np.float32)[None, :, None]
            tensor = ir.Tensor(array, name=f"{past.name}.scale")
            value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
            graph.graph.register_initializer(value)
            node.replace_input_with(SCALES + position, value)
        for name, setting in _ATTRIBUTES.items():
            node.attributes[name] = ir.AttrInt64(name, setting) if isinstance(setting, int) else ir.AttrString(name, setting)
        _retype(node, ir.DataType.INT8)
    graph.metadata_props[METADATA] = "int8"


def to_float(graph: ir.Model) -> None:
    """Undo ``to_int8``, where it was done."""
    if graph.metadata_props.pop(METADATA, None) is None:
        return
    for node in attention(graph):
        for value in node.inputs[SCALES : SCALES + 2]:
            assert value is not None and value.name is not None
            del graph.graph.initializers[value.name]
        length = max(index for index, value in enumerate(node.inputs[:SCALES]) if value is not None) + 1
        node.resize_inputs(length)
        for name in _ATTRIBUTES:
            del node.attributes[name]
        _retype(node, ir.DataType.FLOAT)


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    for value in (*node.inputs[PAST], *node.outputs[1:3]):
        assert value is not None
        value.type = ir.TensorType(dtype)
