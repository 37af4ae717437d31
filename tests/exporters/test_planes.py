"""Codes of 3, 5 and 6 bits: few bits in the file, the bytes of 4 or 8 for the operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import save, weight_bytes_per_token
from edgepress.exporters.graph.operators import operator, stacked
from edgepress.exporters.graph.planes import DOMAIN, keep_codes_in_planes
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.layout import PackedRow, check_arrays
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.planes import PLANES, file_bytes, joined, operator_bits, split
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.quantize.mix import Form, bytes_of, graph_bytes
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.verify import checks
from families import TINY
from transformers import LlamaConfig

BITS = sorted(PLANES)


def random_linear(bits: int, rows: int, columns: int, group: int, zeros: bool) -> PackedLinear:
    dice = np.random.default_rng([bits, rows, columns, group, zeros])
    shape = rows, -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    points = dice.integers(0, 1 << bits, shape, dtype=np.uint8) if zeros else None
    return PackedLinear.from_codes("m", codes, scales, points, bits, group)


def graph_of(linear: PackedLinear) -> ir.Model:
    """Products with a matrix, and rows of it by ids where an embedding can have its form."""
    b = Builder()
    if linear.shape[1] % linear.group_size == 0:
        ids = b.input("ids", ir.DataType.INT64, ["batch", "tokens"])
        b.output(b.embedding(ids, linear, "m"), "rows", ir.DataType.FLOAT, ["batch", "tokens", linear.shape[1]])
    x = b.input("x", ir.DataType.FLOAT, ["tokens", linear.shape[1]])
    b.output(b.linear(x, linear, "head", 0, "m"), "y", ir.DataType.FLOAT, ["tokens", linear.shape[0]])
    model = b.model({})
    keep_codes_in_planes(model, b.stored_bits)
    return model


def constants_of(model: ir.Model) -> list[ir.TensorProtocol]:
    """Weights of a graph, without the shapes that zero points get back."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in tensors if tensor is not None and tensor.dtype != ir.DataType.INT64]


@pytest.mark.parametrize("bits", BITS)
def test_the_tables(bits: int) -> None:
    """Every byte that an operator reads comes back, from as few bits as it has, and every bit of a plane is used once."""
    row = PLANES[bits]
    used = [row.own] * row.number
    for pieces in row.others:
        for piece in pieces:
            assert used[piece.plane] & piece.mask == 0
            used[piece.plane] |= piece.mask
    assert used == [0xFF] * row.number
    codes = np.arange(1 << bits, dtype=np.uint8)
    read = codes if row.operator_bits == 8 else (codes[:, None] | codes << 4).ravel()
    for shift in range(row.parts):  # every byte in every part
        whole = np.concatenate([np.roll(read, number * 5 + shift) for number in range(row.parts)])[None]
        planes = split(whole, bits)
        assert np.array_equal(joined(planes, bits), whole)
        assert sum(plane.nbytes for plane in planes) == whole.size * bits // row.operator_bits == file_bytes(whole.size, bits)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 128, 32), (16, 96, 64), (7, 172, 16), (5, 256, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_the_operator_computes_with_our_weights(
    tmp_path: Path, bits: int, rows: int, columns: int, group: int, zeros: bool
) -> None:
    """Products and embedding rows are those of the codes, at widths that no group and zero points that no plane divides, too.

    onnxruntime has made the bytes before it runs: what it optimized has no such node left.
    """
    linear = random_linear(bits, rows, columns, group, zeros)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = graph_of(linear)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    weight, x = linear.dequantized(), np.random.default_rng(rows).standard_normal((3, columns), dtype=np.float32)
    given = {"x": x, "ids": np.arange(rows)[None]}
    *found, products = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
    assert len(found) == (columns % group == 0) and all(np.allclose(one[0], weight, rtol=1e-6) for one in found)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(products - exact).max() < 1e-5 * np.abs(exact).max()
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"BitShift", "BitwiseAnd", "BitwiseOr", "Concat"}
    assert {(node.domain, node.op_type) for node in model.graph if node.domain == DOMAIN} == {(DOMAIN, f"Join{bits}")}

    stored = sum(tensor.nbytes for tensor in constants_of(model)) - linear.scales.nbytes // 2  # not in half yet
    assert linear.nbytes == bytes_of(rows, columns, Form(bits, group), not zeros) and 0 <= stored - linear.nbytes < 8
    kind, arrays, attributes = operator(linear, 0)
    assert kind == "MatMulNBits" and attributes["bits"] == operator_bits(bits)
    assert weight_bytes_per_token(model) == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("bits", BITS)
def test_what_planes_take_in_the_graph(bits: int, tmp_path: Path) -> None:
    """--max-size counts on it: names and nodes are a fifth of a per cent of a small model."""
    sizes = []
    for taken in (bits, 8):
        b = Builder()
        x = b.input("x", ir.DataType.FLOAT, ["tokens", 256])
        for layer in range(12):
            for place in ("self_attn.qkv_proj", "mlp.down_proj"):
                x = b.linear(x, random_linear(taken, 256, 256, 64, True), f"model.layers.{layer}.{place}", 4)
        b.output(x, "y", ir.DataType.FLOAT, ["tokens", 256])
        model = b.model({})
        keep_codes_in_planes(model, b.stored_bits)
        save(model, tmp_path / f"{taken}.onnx")
        sizes.append((tmp_path / f"{taken}.onnx").stat().st_size)
    each = (sizes[0] - sizes[1]) / 24
    assert 0.8 * graph_bytes(Form(bits, 64)) < each < graph_bytes(Form(bits, 64))


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_have_too_many_bits_are_no_codes(bits: int) -> None:
    """They would run into their neighbours."""
    linear = random_linear(bits, 8, 64, 32, zeros=False)
    row = PackedRow(linear.shape, bits, 32)  # type: ignore[arg-type]
    check_arrays(row, {"codes": linear.codes, "scales": linear.scales})
    linear.codes[3, 0, 5] = 1 << bits
    with pytest.raises(ValueError, match=f"codes of more than {bits} bits"):
        check_arrays(row, {"codes": linear.codes, "scales": linear.scales})


@pytest.mark.parametrize("bits", BITS)
def test_matrices_of_one_operator(bits: int) -> None:
    """Rows of two matrices as one, of which one has no zero points: half of its codes' range in either, not the operator's."""
    one, other = (random_linear(bits, rows, 64, 32, zeros) for rows, zeros in ((8, False), (16, True)))
    both = stacked("both", [one, other])
    assert both is not None and np.array_equal(both.dequantized(), np.concatenate([one.dequantized(), other.dequantized()]))


@pytest.mark.parametrize(("method", "exporter"), [("gptq", "fused"), pytest.param("rtn", "portable", marks=pytest.mark.families)])
def test_the_artifact_computes_what_the_checkpoint_does(
    method: str, exporter: str, text: Path, tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    """Matrices of 3, 5 and 6 bits in one model, and the artifact is as small as that promises."""
    source = random_model(LlamaConfig(**TINY), tmp_path / "model")
    rules = (".*mlp.down_proj=3/64", ".*mlp.*=6/32", ".*layers.0.*=4")
    options = QuantizeOptions(method=method, bits=5, group_size=64, bits_for=rules, calibration=text, calibration_tokens=256)
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", options)
    assert packed.steps[-1].facts["bits"].keys() == {"3", "4", "5", "6"}
    whole = tmp_path / "whole"
    eight = stages.run("quantize", Artifact.load(source), whole, QuantizeOptions(method="rtn", bits=8, group_size=64))
    made, larger = (
        stages.run("export", one, tmp_path / name, ExportOptions(exporter=exporter, accuracy_level="0", text=text))
        for one, name in ((packed, "onnx"), (eight, "onnx-8"))
    )
    graph = ir.load(made.path / "model.onnx")
    assert {name for _, name, _ in graph.functions} == {"Join3", "Join5", "Join6"}
    saved = [sum(matrix.nbytes for matrix in PackedFile(one.path).values()) for one in (eight, packed)]
    stored = [sum(tensor.nbytes for tensor in constants_of(ir.load(one.path / "model.onnx"))) for one in (larger, made)]
    assert abs(stored[0] - stored[1] - (saved[0] - saved[1])) < 100  # of zero points, each rounded up to a byte
    assert checks._graph(made.path)  # a function has the opset of its model, for one
    ids = np.arange(0, 256, 37)
    truth = logits_of(Checkpoint(packed.path).model(), ids)
    logits = Decoder(made.path).feed(ids, keep=0)
    assert np.abs(logits - truth).max() <= 1e-3 * truth.std()
