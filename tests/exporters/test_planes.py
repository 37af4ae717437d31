"""Codes of 3, 5 and 6 bits: few bits in the file, the bytes of 4 or 8 for the operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import weight_bytes_per_token
from edgepress.exporters.graph.operators import operator, stacked
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.planes import PLANES, joined, operator_bits, split, stored_bytes
from edgepress.pipeline.quantize.mix import Form, bytes_of

BITS = sorted(PLANES)


def random_linear(bits: int, rows: int, columns: int, group: int, zeros: bool) -> PackedLinear:
    dice = np.random.default_rng([bits, rows, columns, group, zeros])
    shape = rows, -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    points = dice.integers(0, 1 << bits, shape, dtype=np.uint8) if zeros else None
    return PackedLinear.from_codes("m", codes, scales, points, bits, group)


def graph_of(linear: PackedLinear) -> ir.Model:
    """Rows of a matrix by ids, and their products with the same matrix: a tied embedding and head."""
    b = Builder()
    ids = b.input("ids", ir.DataType.INT64, ["batch", "tokens"])
    x = b.embedding(ids, linear, "m")
    b.output(x, "rows", ir.DataType.FLOAT, ["batch", "tokens", linear.shape[1]])
    b.output(b.linear(x, linear, "head", 0, "m"), "y", ir.DataType.FLOAT, ["batch", "tokens", linear.shape[0]])
    return b.model({})


@pytest.mark.parametrize("bits", BITS)
def test_the_tables(bits: int) -> None:
    """Every byte that an operator reads comes back, from as few bits as it has, and every bit of a plane is used once."""
    row = PLANES[bits]
    used = [row.mask] * row.count
    for pieces in row.spread:
        for piece in pieces:
            assert used[piece.plane] & piece.mask == 0
            used[piece.plane] |= piece.mask
    assert used == [0xFF] * row.count
    most = 1 << bits
    read = (
        np.arange(most, dtype=np.uint8) if row.bits == 8 else np.array([a | b << 4 for a in range(8) for b in range(8)], np.uint8)
    )
    for shift in range(row.parts):  # every byte in every part
        whole = np.concatenate([np.roll(read, number * 5 + shift) for number in range(row.parts)])[None]
        planes = split(whole, bits)
        assert np.array_equal(joined(planes, bits), whole)
        assert sum(plane.nbytes for plane in planes) == whole.size * bits // row.bits == stored_bytes(whole.size, bits)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(24, 128, 32), (16, 96, 64), (7, 172, 16), (5, 256, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_the_operator_computes_with_our_weights(
    tmp_path: Path, bits: int, rows: int, columns: int, group: int, zeros: bool
) -> None:
    """Embedding rows and products are those of the codes, at widths that no group divides and rows that no plane does, too.

    onnxruntime has made the bytes before it runs: what it optimized has no such node left.
    """
    linear = random_linear(bits, rows, columns, group, zeros)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = graph_of(linear)
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found, products = (np.asarray(output)[0] for output in session.run(None, {"ids": np.arange(rows)[None]}))
    weight = linear.dequantized()
    assert np.allclose(found, weight, rtol=1e-6)
    exact = weight.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(products - exact).max() < 1e-5 * np.abs(exact).max()
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"BitShift", "BitwiseAnd", "BitwiseOr", "Concat"}

    stored = [value.const_value for name, value in model.graph.initializers.items() if name.startswith("m.")]
    sizes = {tensor.name: tensor.nbytes for tensor in stored if tensor is not None and not str(tensor.name).endswith(".shape")}
    assert sizes["m.scales"] == linear.scales.nbytes
    assert sum(sizes.values()) - linear.scales.nbytes // 2 == linear.nbytes == bytes_of(rows, columns, Form(bits, group), not zeros)
    kind, arrays, attributes = operator(linear, 0)
    assert kind == "MatMulNBits" and attributes["bits"] == operator_bits(bits)
    assert weight_bytes_per_token(model) == sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("bits", BITS)
def test_matrices_of_one_operator(bits: int) -> None:
    """Rows of two matrices as one, of which one has no zero points: half of its codes' range in either, not the operator's."""
    one, other = (random_linear(bits, rows, 64, 32, zeros) for rows, zeros in ((8, False), (16, True)))
    both = stacked("both", [one, other])
    assert both is not None and np.array_equal(both.dequantized(), np.concatenate([one.dequantized(), other.dequantized()]))
