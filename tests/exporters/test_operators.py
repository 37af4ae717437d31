"""MatMulNBits and MatMulBnb4 as onnxruntime computes them, against the weights that the codes stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.operators import operator, stacked
from edgepress.pipeline.checkpoint.packed import PackedLinear

ROWS = 24


def random_linear(bits: int, columns: int, group: int, zeros: bool, rows: int = ROWS, seed: int = 0) -> PackedLinear:
    dice = np.random.default_rng([seed, bits, columns, group, zeros])
    groups = -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, (rows, groups)).astype(np.float32)
    points = dice.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
    return PackedLinear.from_codes("m", codes, scales, points if zeros else None, bits, group)


def random_codebook(kind: str, rows: int, columns: int, group: int = 64, seed: int = 0) -> PackedLinear:
    dice = np.random.default_rng([seed, rows, columns, group])
    codes = dice.integers(0, 256, -(-rows * columns // 2), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, -(-rows * columns // group)).astype(np.float32)
    return PackedLinear("m", (rows, columns), 4, group, codes, scales, codebook=kind)


def inputs(columns: int, tokens: int = 7) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((tokens, columns), dtype=np.float32)


def save(linear: PackedLinear | np.ndarray, file: Path, level: int = 0) -> Path:
    """A model of one node, ``y = x @ weight.T``."""
    builder = Builder()
    rows, columns = linear.shape
    y = builder.linear(builder.input("x", ir.DataType.FLOAT, ["tokens", columns]), linear, "node", level)
    builder.output(y, "y", ir.DataType.FLOAT, ["tokens", rows])
    ir.save(builder.model({}), file)
    return file


def compute(file: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    output: np.ndarray = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return output


def relative_error(output: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    assert output.shape == exact.shape
    return float(np.abs(output - exact).max() / np.abs(exact).max())


def constants(file: Path) -> dict[str, np.ndarray]:
    """The constant inputs of the one node, by their names in the operator's schema."""
    graph = onnx.load(file).graph
    (node,) = graph.node
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    names = {"MatMulNBits": ["B", "scales", "zero_points"], "MatMulBnb4": ["B", "absmax"]}[node.op_type]
    return dict(zip(names, [stored[name] for name in node.input[1:]], strict=False))


@pytest.mark.parametrize("columns", [64, 96, 172, 256])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits(tmp_path: Path, bits: int, group: int, zeros: bool, columns: int) -> None:
    """The operator computes with exactly our weights, one token or many, also where the group does not divide the width.

    The arrays in the file are the quantizer's, unchanged.
    """
    linear = random_linear(bits, columns, group, zeros)
    file, x = save(linear, tmp_path / "m.onnx"), inputs(columns)
    for piece in (x, x[:1]):
        assert relative_error(compute(file, piece), piece, linear.dequantized()) < 1e-5

    arrays = constants(file)
    assert np.array_equal(arrays["B"], linear.codes) and np.array_equal(arrays["scales"], linear.scales)
    assert arrays["B"].shape == (ROWS, linear.groups, group * bits // 8)
    assert ("zero_points" in arrays) == zeros
    if linear.zeros is not None:
        stored = arrays["zero_points"]
        assert stored.shape == (ROWS, -(-linear.groups * bits // 8))
        read = [[stored[n, b * bits // 8] >> (b * bits % 8) & ((1 << bits) - 1) for b in range(linear.groups)] for n in range(ROWS)]
        assert np.array_equal(read, linear.zeros)


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (24, 96), (7, 172), (5, 256), (5, 96)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_matmul_bnb4(tmp_path: Path, kind: str, rows: int, columns: int) -> None:
    """Codes of bitsandbytes as they are: groups that straddle rows, a short last group, and the two tables not confused."""
    linear = random_codebook(kind, rows, columns)
    file, x = save(linear, tmp_path / "m.onnx"), inputs(columns)
    for piece in (x, x[:1]):
        assert relative_error(compute(file, piece), piece, linear.dequantized()) < 1e-5
    arrays = constants(file)
    assert np.array_equal(arrays["B"], linear.codes) and np.array_equal(arrays["absmax"], linear.scales)


def test_float_matrix(tmp_path: Path) -> None:
    """The same call carries what stays float."""
    weight = np.random.default_rng(0).standard_normal((ROWS, 96), dtype=np.float32)
    x = inputs(96)
    assert relative_error(compute(save(weight, tmp_path / "m.onnx"), x), x, weight) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_accuracy_level(tmp_path: Path, bits: int) -> None:
    """Level 4 rounds activations to int8: near, and not the same, or the attribute never reached the operator."""
    linear, x = random_linear(bits, 256, 64, zeros=True), inputs(256)
    rough = compute(save(linear, tmp_path / "4.onnx", level=4), x)
    assert not np.array_equal(rough, compute(save(linear, tmp_path / "0.onnx", level=0), x))
    assert 1e-4 < relative_error(rough, x, linear.dequantized()) < 2e-2
    assert operator(linear, 4)[2]["accuracy_level"] == 4


@pytest.mark.parametrize("zeros", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (4, 32), (4, 128), (8, 64)])
def test_stacked(tmp_path: Path, bits: int, group: int, zeros: tuple[bool, ...]) -> None:
    """Query, key and value as one operator give what the three give, also when only some have stored zero points."""
    parts = [random_linear(bits, 96, group, z, rows, seed) for seed, (rows, z) in enumerate(zip((24, 8, 16), zeros, strict=True))]
    whole = stacked("qkv", parts)
    assert whole is not None and whole.name == "qkv" and whole.shape == (48, 96)
    assert (whole.zeros is not None) == any(zeros)
    assert np.array_equal(whole.dequantized(), np.concatenate([part.dequantized() for part in parts]))
    x = inputs(96)
    output = compute(save(whole, tmp_path / "whole.onnx"), x)
    single = [compute(save(part, tmp_path / f"{i}.onnx"), x) for i, part in enumerate(parts)]
    assert np.allclose(output, np.concatenate(single, axis=1), rtol=1e-5, atol=1e-6 * np.abs(output).max())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_stacked_codebook(tmp_path: Path, kind: str) -> None:
    """Codebook groups stay whole when each matrix ends on one; only the last may be short."""
    parts = [random_codebook(kind, rows, 96, seed=rows) for rows in (8, 2, 5)]
    whole = stacked("qkv", parts)
    assert whole is not None and whole.codebook == kind and whole.shape == (15, 96)
    assert np.array_equal(whole.dequantized(), np.concatenate([part.dequantized() for part in parts]))
    x = inputs(96)
    assert relative_error(compute(save(whole, tmp_path / "m.onnx"), x), x, whole.dequantized()) < 1e-5
    assert stacked("qkv", [random_codebook(kind, 5, 96), *parts]) is None  # 480 weights: half a group left over


@pytest.mark.parametrize(
    "other",
    [
        random_linear(4, 128, 32, False),
        random_linear(8, 96, 32, False),
        random_linear(4, 96, 64, False),
        random_codebook("nf4", ROWS, 96, 32),
    ],
    ids=["width", "bits", "group", "codebook"],
)
def test_stacked_refuses_differing_layouts(other: PackedLinear) -> None:
    """Recipes may give matrices different layouts; they are not stacked, in whatever order they come."""
    first = random_linear(4, 96, 32, False)
    assert stacked("m", [first, first]) is not None
    assert stacked("m", [first, other]) is None and stacked("m", [other, first]) is None


def test_stacked_refuses_two_codebooks() -> None:
    """nf4 and fp4 codes look alike and mean different weights."""
    assert stacked("m", [random_codebook("nf4", 2, 64), random_codebook("fp4", 2, 64)]) is None
