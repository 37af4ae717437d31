"""Graphs on disk: saved with their weights in a second file, and as variants over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.cache import to_float
from edgepress.exporters.graph.planes import DOMAIN as PLANES_DOMAIN

SMALL = 256  # bytes; shorter constants stay in the graph's own file
# Operators that read a few rows of a constant (an embedding, rotary tables), or only reshape it.
_READS_ROWS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "Reshape"}


def weight_bytes_per_token(model: ir.Model) -> int:
    """Bytes of the constants that one decoding step reads whole: all weights but embedding rows and rotary tables.

    Scales count as the float32 numbers, planes as the bytes of 4 or 8 bits, that onnxruntime makes of them when it loads the graph.
    """
    total = 0
    for value in model.graph.initializers.values():
        if value.const_value is None:
            continue
        for reader, _ in value.uses():
            if reader.domain == PLANES_DOMAIN:
                break
            cast = reader.op_type == "Cast"
            readers = {after.op_type for after, _ in reader.outputs[0].uses()} if cast else {reader.op_type}
            if readers - _READS_ROWS:
                total += value.const_value.size * 4 if cast else value.const_value.nbytes
                break
    return total + sum(_bytes_made(node) for node in model.graph if node.op_type == "MatMulNBits")


def _bytes_made(node: ir.Node) -> int:
    """Of the codes and zero points that a MatMulNBits reads, those that are made of planes."""
    rows, columns, bits, block = (node.attributes[name].as_int() for name in ("N", "K", "bits", "block_size"))
    groups = -(-columns // block)
    sizes = {1: rows * groups * block * bits // 8, 3: rows * -(-groups * bits // 8)}  # by input
    made = (sizes[place] for place, value in enumerate(node.inputs) if place in sizes and value and not value.is_initializer())
    return sum(made)


def save(model: ir.Model, file: Path) -> None:
    """Write ``file``, and its weights to ``file.data`` next to it; weights that are in a file already stay there.

    Afterwards the model holds no weights in memory: an onnx_ir graph refers to itself, and would keep them until Python's
    garbage collector runs. Declared shapes of weights are dropped: onnxruntime's quantize_dynamic transposes weights and
    then fails on the old shapes.
    """
    for value in model.graph.initializers.values():
        if value not in model.graph.inputs:
            value.type = value.shape = None
            value.metadata_props.clear()
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()):
        ir.external_data.unload_from_model(model, file.parent, f"{file.name}.data", size_threshold_bytes=SMALL)
    ir.save(model, file)


def rows_in_place(file: Path) -> ir.Model:
    """Let a saved model gather embedding rows directly from the weight file; returns the model, its weights on disk alone.

    The Reshape before a GatherBlockQuantized becomes a second initializer over the same bytes: onnxruntime would fold the
    Reshape into a copy in memory, but of a mapped file it loads only the rows that are read.
    """
    model = ir.load(file)
    for node in [n for n in model.graph if n.op_type == "Reshape"]:
        matrix, readers = node.inputs[0], [(reader, index) for reader, index in node.outputs[0].uses()]
        source = matrix.const_value if matrix is not None else None
        if not isinstance(source, ir.ExternalTensor) or any(reader.op_type != "GatherBlockQuantized" for reader, _ in readers):
            continue
        assert matrix is not None and matrix.name and source.length is not None
        rows = ir.Shape([int(source.shape[0]), source.length // int(source.shape[0])])
        only_use = len(matrix.uses()) == 1
        name = matrix.name if only_use else f"{matrix.name}.rows"
        view = ir.ExternalTensor(
            source.location, source.offset, source.length, source.dtype, shape=rows, name=name, base_dir=file.parent
        )
        value = ir.Value(name=name, const_value=view)
        for reader, index in readers:
            reader.replace_input_with(index, value)
        model.graph.remove(node, safe=True)
        if only_use:
            del model.graph.initializers[matrix.name]
        model.graph.register_initializer(value)
    save(model, file)
    return model


def give_all_logits(file: Path) -> ir.Model:
    """Let a saved model give the logits of every position where ``logits_to_keep`` is not fed, and declare them so."""
    model = ir.load(file)
    model.graph.initializers["logits_to_keep"].const_value = ir.Tensor(np.array([0], dtype=np.int64), name="logits_to_keep")
    logits, ids = model.graph.outputs[0], model.graph.inputs[0]
    assert logits.shape is not None and ids.shape is not None
    logits.shape = ir.Shape([*ids.shape[:2], logits.shape[2]])
    save(model, file)
    return model


def level_0(node: str) -> int:
    """Float activations in every node."""
    return 0


def save_variant(
    model: Path,
    out: Path,
    level_of: Callable[[str], int] = level_0,
    outputs: Sequence[str] = (),
    *,
    float_cache: bool = False,
) -> None:
    """Write a graph with other accuracy levels, over the same external weights; ``out`` may be ``model``.

    level_of: node name -> accuracy level. outputs: values inside the graph that become outputs too. float_cache: whatever it was.
    """
    graph = ir.load(model)
    if float_cache:
        to_float(graph)
    for node in graph.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level_of(node.name or ""))
        for value in node.outputs:
            if value.name in outputs:
                value.type = graph.graph.outputs[0].type
                graph.graph.outputs.append(value)
    save(graph, out)


@contextmanager
def variant(folder: Path, level_of: Callable[[str], int] = level_0, outputs: Sequence[str] = ()) -> Iterator[str]:
    """File name of a ``save_variant`` of the graph in ``folder``; deleted afterwards."""
    file = folder / "parity.onnx"
    try:
        save_variant(folder / "model.onnx", file, level_of, outputs)
        yield file.name
    finally:
        file.unlink(missing_ok=True)
