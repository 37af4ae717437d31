"""Codes of 3, 5 and 6 bits on disk: their planes in the file (pipeline/checkpoint/planes.py), for the operator the bytes of 4 or 8.

A function of the model puts the bytes together. onnxruntime inlines it and computes it once, when it loads the graph (constant
folding), so that the kernel sees constants. Until then each step's result is in memory: three and a half bytes for one that
the operator reads. And each step takes a tenth of a millisecond, however little it makes: zero points, of which there are few, are
put together all at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from edgepress.pipeline.checkpoint.planes import PLANES, Piece, Planes, split

DOMAIN = "edgepress"
JOINED = ".joined"  # what the operator reads is called after the initializer


def keep_codes_in_planes(model: ir.Model, bits: Mapping[str, int]) -> None:
    """Store initializers uint8 in planes. bits: of the codes that each holds, by name."""
    graph, nodes = model.graph, list[ir.Node]()
    few: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for name, stored in bits.items():
        value = graph.initializers.get(name)
        if value is None or value.const_value is None:
            continue
        read = value.const_value.numpy()
        if read.ndim == 3:  # codes
            nodes.append(_joined(model, name, read, stored))
            _replace(graph, name, nodes[-1])
        else:
            few[stored][name] = read
    for stored, arrays in few.items():
        nodes += _joined_at_once(model, arrays, stored)
    if nodes:
        graph.insert_before(graph[0], nodes)


def _joined(model: ir.Model, name: str, read: np.ndarray, bits: int) -> ir.Node:
    """What makes the bytes that an operator reads of their planes, which become initializers."""
    graph, kind = model.graph, f"Join{bits}"
    if (DOMAIN, kind, "") not in model.functions:
        model.functions[DOMAIN, kind, ""] = _function(kind, PLANES[bits], graph.opset_imports[""])
        graph.opset_imports[DOMAIN] = 1
    planes = [_initializer(graph, f"{name}.plane{number}", plane) for number, plane in enumerate(split(read, bits))]
    return _node(kind, planes, f"{name}{JOINED}", domain=DOMAIN)


def _joined_at_once(model: ir.Model, arrays: Mapping[str, np.ndarray], bits: int) -> list[ir.Node]:
    """The same of several initializers with common planes, which they take the place of."""
    graph, place, parts = model.graph, f"zero_points.{bits}", PLANES[bits].parts
    flat = np.concatenate([array.ravel() for array in arrays.values()])
    rest = -len(flat) % parts
    lengths = ir.Tensor(np.array([*(array.size for array in arrays.values()), *([rest] if rest else [])], np.int64))
    # a node, for initializers of this size are in the other file, where shapes are not inferred from them
    sizes = ir.node("Constant", [], {"value": lengths}, outputs=[ir.Value(name=f"{place}.sizes")], name=f"{place}.sizes")
    joined = _joined(model, place, np.pad(flat, (0, rest)), bits)
    pieces = [ir.Value(name=f"{name}{JOINED}") for name in arrays]
    outputs = [*pieces, *([ir.Value(name=f"{place}.rest")] if rest else [])]
    inputs = [joined.outputs[0], sizes.outputs[0]]
    nodes = [joined, sizes, ir.node("Split", inputs, {"axis": 0}, outputs=outputs, name=f"{place}.split")]
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for (name, array), piece in zip(arrays.items(), pieces, strict=True):
        if array.shape not in shapes:
            shape = ".".join(map(str, array.shape))
            shapes[array.shape] = _initializer(graph, f"{place}.{shape}", np.array(array.shape, np.int64))
        nodes.append(_node("Reshape", [piece, shapes[array.shape]], f"{name}.reshaped"))
        _replace(graph, name, nodes[-1])
    return nodes


def _replace(graph: ir.Graph, name: str, node: ir.Node) -> None:
    """Let a node's output be read in the place of an initializer, which goes."""
    for reader, index in list(graph.initializers[name].uses()):
        reader.replace_input_with(index, node.outputs[0])
    del graph.initializers[name]


def _function(kind: str, row: Planes, opset: int) -> ir.Function:
    """Planes in, the bytes that they hold out, along the last axis."""
    planes = [ir.Value(name=f"plane{number}") for number in range(row.number)]
    nodes, constants = list[ir.Node](), dict[int, ir.Value]()

    def op(name: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        nodes.append(_node(name, inputs, f"step{len(nodes)}", **attributes))
        return nodes[-1].outputs[0]

    def byte(value: int) -> ir.Value:
        if value not in constants:
            tensor = ir.Tensor(np.array(value, np.uint8))
            nodes.append(ir.node("Constant", [], {"value": tensor}, outputs=[ir.Value(name=f"byte{value}")]))
            constants[value] = nodes[-1].outputs[0]
        return constants[value]

    def piece(one: Piece) -> ir.Value:
        plane, top = planes[one.plane], (0xFF >> one.shift) << one.shift
        # a shift drops the bits below, not those above
        masked = plane if one.mask & top == top else op("BitwiseAnd", [plane, byte(one.mask)])
        return op("BitShift", [masked, byte(one.shift)], direction="RIGHT")

    parts = [op("BitwiseAnd", [plane, byte(row.own)]) for plane in planes]
    for pieces in row.others:
        made = piece(pieces[0])
        for other in pieces[1:]:
            made = op("BitwiseOr", [made, piece(other)])
        parts.append(made)
    whole = op("Concat", parts, axis=-1)
    return ir.Function(DOMAIN, kind, graph=ir.Graph(planes, [whole], nodes=nodes, opset_imports={"": opset}), attributes=[])


def _node(kind: str, inputs: Sequence[ir.Value], name: str, domain: str = "", **attributes: Any) -> ir.Node:
    return ir.node(kind, inputs, attributes, domain=domain, outputs=[ir.Value(name=name)], name=name)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    graph.register_initializer(value)
    return value
