"""Codes of 3, 5 and 6 bits on disk: their planes in the file (pipeline/checkpoint/planes.py), for the operator the bytes of 4 or 8.

A function of the model puts the bytes together. onnxruntime inlines it and computes it once, when it loads the graph (constant
folding), so that the kernel sees constants. Until then each step's result is in memory: three and a half bytes for one that
the operator reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from edgepress.pipeline.checkpoint.planes import PLANES, Piece, Planes, split

DOMAIN = "edgepress"
JOINED = ".joined"  # what the operator reads is called after the initializer


def keep_codes_in_planes(model: ir.Model, bits: Mapping[str, int]) -> None:
    """Store initializers uint8 in planes. bits: of the codes that each holds, by name.

    Those that no number of planes divides stay as they are: zero points of a few rows.
    """
    graph, done = model.graph, dict[str, ir.Value]()
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is None or value.name not in bits or not value.is_initializer() or value.const_value is None:
                continue
            if value.name not in done and (nodes := _nodes(model, value.name, value.const_value.numpy(), bits[value.name])):
                graph.insert_before(node, nodes)
                done[value.name] = nodes[-1].outputs[0]
            if value.name in done:
                node.replace_input_with(index, done[value.name])
    for name in done:
        del graph.initializers[name]


def _nodes(model: ir.Model, name: str, read: np.ndarray, bits: int) -> list[ir.Node]:
    """What makes an initializer of its planes, which become initializers; the last node's output is it."""
    row, graph = PLANES[bits], model.graph
    whole = read if read.shape[-1] % row.parts == 0 else read.reshape(-1)
    if whole.size % row.parts:
        return []
    planes = [_initializer(graph, f"{name}.plane{number}", plane) for number, plane in enumerate(split(whole, bits))]
    kind = f"Join{bits}"
    if (DOMAIN, kind, "") not in model.functions:
        model.functions[DOMAIN, kind, ""] = _function(kind, row, graph.opset_imports[""])
        graph.opset_imports[DOMAIN] = 1
    nodes = [_node(kind, planes, f"{name}{JOINED}", domain=DOMAIN)]
    if whole is not read:
        shape = _initializer(graph, f"{name}.shape", np.array(read.shape, np.int64))
        nodes.append(_node("Reshape", [nodes[0].outputs[0], shape], f"{name}.reshaped"))
    return nodes


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
