"""Graphs on the disk: saved with their weights beside them, and as variants over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

SMALL = 256  # bytes; shorter constants stay in the graph's own file
# Operators that read a few rows of a constant (an embedding, rotary tables), or see it in another shape.
_READS_ROWS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "Reshape"}


def weight_bytes_per_token(model: ir.Model) -> int:
    """Bytes of the constants that one decoding step reads whole: all weights but embedding rows and rotary tables."""
    read = {v.name: v for n in model.graph for v in n.inputs if v is not None and n.op_type not in _READS_ROWS}
    tensors = [v.const_value for name, v in model.graph.initializers.items() if name in read]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def save(model: ir.Model, file: Path) -> None:
    """Write ``file`` and, beside it, its weights in ``file.data``; those that lie in a file already stay there.

    Afterwards the weights are on the disk alone: an onnx_ir graph refers to itself, and would hold them until Python's garbage
    collector comes by.

    Declared shapes of weights are left out: onnxruntime's quantize_dynamic transposes weights and then stumbles over them.
    """
    for value in model.graph.initializers.values():
        if value not in model.graph.inputs:
            value.type = value.shape = None
            value.metadata_props.clear()
    known = any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values())
    if not known:
        ir.external_data.unload_from_model(model, file.parent, f"{file.name}.data", size_threshold_bytes=SMALL)
    ir.save(model, file)


def rows_in_place(file: Path) -> ir.Model:
    """Let a saved model gather embedding rows from where the matrix lies; returns the model, its weights on the disk alone.

    The Reshape before a GatherBlockQuantized becomes a second initializer over the same bytes of the weight file: onnxruntime
    would fold the Reshape into a copy in memory, whereas of a mapped file only the rows that are read come in.
    """
    written = ir.load(file)
    for node in [n for n in written.graph if n.op_type == "Reshape"]:
        matrix, readers = node.inputs[0], [(reader, index) for reader, index in node.outputs[0].uses()]
        source = matrix.const_value if matrix is not None else None
        if not isinstance(source, ir.ExternalTensor) or any(reader.op_type != "GatherBlockQuantized" for reader, _ in readers):
            continue
        assert matrix is not None and matrix.name and source.length is not None
        rows = ir.Shape([int(source.shape[0]), source.length // int(source.shape[0])])
        alone = len(matrix.uses()) == 1
        name = matrix.name if alone else f"{matrix.name}.rows"
        view = ir.ExternalTensor(
            source.location, source.offset, source.length, source.dtype, shape=rows, name=name, base_dir=file.parent
        )
        value = ir.Value(name=name, const_value=view)
        for reader, index in readers:
            reader.replace_input_with(index, value)
        written.graph.remove(node, safe=True)
        if alone:
            del written.graph.initializers[matrix.name]
        written.graph.register_initializer(value)
    save(written, file)
    return written


def _float_activations(node: str) -> int:
    return 0


def save_at_levels(model: Path, out: Path, level_of: Callable[[str], int] = _float_activations, also: Sequence[str] = ()) -> None:
    """Write a graph with the accuracy levels that ``level_of`` gives to its nodes, by name (0 to all); ``out`` may be ``model``.

    Weights stay references to the same external file. also: values inside that become outputs.
    """
    variant = ir.load(model)
    for node in variant.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level_of(node.name or ""))
        for value in node.outputs:
            if value.name in also:
                value.type = variant.graph.outputs[0].type
                variant.graph.outputs.append(value)
    save(variant, out)


@contextmanager
def variant(folder: Path, level_of: Callable[[str], int] = _float_activations, also: Sequence[str] = ()) -> Iterator[str]:
    """File name of the graph in ``folder`` as ``save_at_levels`` changes it; gone afterwards."""
    file = folder / "parity.onnx"
    try:
        save_at_levels(folder / "model.onnx", file, level_of, also)
        yield file.name
    finally:
        file.unlink(missing_ok=True)
