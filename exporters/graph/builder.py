"""A small builder over onnx_ir: named nodes, weights, and the inputs and outputs that every artifact has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.operators import DOMAIN, operator
from edgepress.pipeline.checkpoint.packed import PackedLinear, by_bits
from edgepress.pipeline.checkpoint.planes import PLANES

OPSET = 21
# GenAI reads models up to this; 10 came with opset 21.
IR_VERSION = 10
LAST = np.iinfo(np.int64).max
PART = ".rows"  # in the name of a part of a matrix, before the row at which it begins


class Builder:
    """Collects nodes and initializers; ``op`` returns the node's first output.

    float: FLOAT or FLOAT16, what float arrays are stored as. stored_bits: of initializers whose codes have fewer bits than the
    operator's, by name.
    """

    def __init__(self, float: ir.DataType = ir.DataType.FLOAT) -> None:
        self.float = float
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.stored_bits: dict[str, int] = {}
        self._gathered: dict[tuple[ir.Value, str], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make a value a graph output under ``name``."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer of this name, made from ``array`` unless it exists."""
        if name not in self.initializers:
            if array.dtype == np.float32:
                with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite and fails the proof
                    array = array.astype(self.float.numpy(), copy=False)
            tensor = ir.Tensor(np.asarray(array, order="C"), name=name)  # ascontiguousarray makes a list of a scalar
            self.initializers[name] = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant."""
        return self.constant("int64." + ".".join(map(str, values)), np.array(values, dtype=np.int64))

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Add a node. outputs: names of all its outputs, "" for an unused one; default: one, named after the node."""
        values = [ir.Value(name=output or "") for output in (outputs or [name])]
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=values, name=name)
        self.nodes.append(node)
        return values[0]

    def linear(
        self, x: ir.Value, weight: PackedLinear | np.ndarray, name: str, accuracy_level: int, weight_name: str | None = None
    ) -> ir.Value:
        """``x @ weight.T`` for a weight (out, in), packed or float32; weight_name: its initializers' (default: the node's)."""
        weight_name = weight_name or name
        if isinstance(weight, np.ndarray):
            return self.op("MatMul", [x, self.constant(f"{weight_name}.weight", weight.T)], name)
        if len(parts := by_bits(weight)) > 1:
            names = [(f"{name}{PART}{row}", f"{weight_name}{PART}{row}") for row, _ in parts]
            scores = [self.linear(x, p, node, accuracy_level, own) for (_, p), (node, own) in zip(parts, names, strict=True)]
            return self.op("Concat", scores, name, axis=-1)
        kind, constants, attributes = operator(weight, accuracy_level)
        if weight.permutation is not None:
            x = self._permuted(x, weight.permutation, weight_name)
        inputs = [x, *(self._stored(weight, f"{weight_name}.{part}", array) for part, array in constants.items())]
        return self.op(kind, inputs, name, None, DOMAIN, **attributes)

    def _stored(self, weight: PackedLinear, name: str, read: np.ndarray) -> ir.Value:
        """A constant that the operator of a packed matrix reads."""
        if weight.bits in PLANES and read.dtype == np.uint8:
            self.stored_bits[name] = weight.bits
        return self.constant(name, read)

    def _permuted(self, x: ir.Value, permutation: np.ndarray, name: str) -> ir.Value:
        """``x[..., permutation]``, gathered once for all the matrices that read x in this order (q, k and v share theirs)."""
        key = (x, hashlib.sha256(permutation.tobytes()).hexdigest())
        if key not in self._gathered:
            order = self.constant(f"{name}.permutation", permutation.astype(np.int32))
            self._gathered[key] = self.op("Gather", [x, order], f"{name}.permuted", axis=-1)
        return self._gathered[key]

    def embedding(self, ids: ir.Value, weight: PackedLinear | np.ndarray, name: str) -> ir.Value:
        """Rows of a matrix (vocabulary, hidden), packed or float32, by ids.

        The codes of a packed one are the initializer that ``linear`` of the same name reads, reshaped: a matrix that serves
        as embedding and head is stored once.
        """
        if isinstance(weight, np.ndarray):
            return self.op("Gather", [self.constant(f"{name}.weight", weight), ids], name)
        if len(parts := by_bits(weight)) > 1:
            return self._from_parts(ids, parts, name)
        _, constants, attributes = operator(weight, 0)
        codes = self._stored(weight, f"{name}.B", constants["B"])
        flat = self.op("Reshape", [codes, self.integers(weight.shape[0], -1)], f"{name}.rows")
        others = [
            self._stored(weight, f"{name}.{part}", constants[part]) for part in ("scales", "zero_points") if part in constants
        ]
        return self.op(
            "GatherBlockQuantized",
            [flat, ids, *others],
            name,
            domain=DOMAIN,
            bits=attributes["bits"],
            block_size=weight.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _from_parts(self, ids: ir.Value, parts: list[tuple[int, PackedLinear]], name: str) -> ir.Value:
        """Rows by ids of a matrix in parts, each with the row at which it begins: looked up in all of them, one is taken."""
        rows: ir.Value | None = None
        for number, (first, part) in enumerate(parts):
            own = self.op("Sub", [ids, self.constant(f"{name}{PART}{first}.first", np.array(first))], f"{name}{PART}{first}.from")
            bounds = [self.constant(f"int64_{n}", np.array(n)) for n in (0, part.shape[0] - 1)]
            own = self.op("Clip", [own, *bounds], f"{name}{PART}{first}.ids")
            found = self.embedding(own, part, f"{name}{PART}{first}")
            if rows is None:
                rows = found
                continue
            before = self.op(
                "Less", [ids, self.constant(f"{name}{PART}{first}.first", np.array(first))], f"{name}{PART}{first}.before"
            )
            before = self.op("Unsqueeze", [before, self.integers(-1)], f"{name}{PART}{first}.before_rows")
            rows = self.op("Where", [before, rows, found], name if number == len(parts) - 1 else f"{name}{PART}{first}.so_far")
        assert rows is not None
        return rows

    def model(self, metadata: dict[str, str]) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name="edgepress",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgepress", metadata_props=metadata)


def last_positions(builder: Builder, hidden: ir.Value) -> ir.Value:
    """The positions whose logits are computed: the last ``logits_to_keep`` of hidden (batch, tokens, hidden), 0 for all.

    ``logits_to_keep`` is an overridable initializer with default 1: a consumer that does not know it never sees it,
    generates with one row of logits a step; evaluation reads all rows from the same file.
    """
    keep = builder.constant("logits_to_keep", np.array([1], dtype=np.int64))
    builder.inputs.append(keep)
    start = builder.op("Neg", [keep], "head.start")  # -0 is 0: from the first position on
    return builder.op("Slice", [hidden, start, builder.integers(LAST), builder.integers(1)], "head.positions")


def block_output(index: int) -> str:
    """Name of the residual stream (batch, tokens, hidden) that a decoder block leaves, in every graph."""
    return f"model.layers.{index}.output"
