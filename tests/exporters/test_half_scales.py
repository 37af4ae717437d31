"""Scales in two bytes on disk: the same numbers for the operator, and float32 where float16 would change one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import weight_bytes_per_token
from edgepress.exporters.graph.half_scales import CAST, keep_scales_in_half
from edgepress.exporters.graph.planes import keep_codes_in_planes
from edgepress.pipeline.checkpoint.packed import PackedLinear, fit_half, in_half
from edgepress.pipeline.quantize.gptq import quantized
from edgepress.pipeline.quantize.rtn import least_largest_scale, round_to_nearest

WEIGHT = np.random.default_rng(0).normal(size=(24, 128)).astype(np.float32)


def graph_of(linear: PackedLinear) -> ir.Model:
    """Rows of a matrix by ids, and their products with the same matrix: a tied embedding and head."""
    b = Builder()
    ids = b.input("ids", ir.DataType.INT64, ["batch", "tokens"])
    x = b.embedding(ids, linear, "m")
    b.output(b.linear(x, linear, "head", 0, "m"), "y", ir.DataType.FLOAT, ["batch", "tokens", 24])
    model = b.model({})
    keep_codes_in_planes(model, b.stored_bits)
    return model


def outputs(model: ir.Model, disabled: bool = False) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    if disabled:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, settings, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": np.arange(24)[None]})[0])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_file_holds_half_and_the_operator_reads_the_same(bits: int) -> None:
    linear = round_to_nearest("m", WEIGHT, bits, 32, False)
    model = graph_of(linear)
    before, read = outputs(model), weight_bytes_per_token(model)
    keep_scales_in_half(model)
    scales = model.graph.initializers["m.scales"].const_value
    assert scales is not None and scales.dtype == ir.DataType.FLOAT16 and np.array_equal(scales.numpy(), linear.scales)
    assert [node.name for node in model.graph if node.op_type == "Cast"] == [f"m.scales{CAST}"]  # one for both
    assert np.array_equal(outputs(model), before) and np.array_equal(outputs(model, disabled=True), before)
    assert weight_bytes_per_token(model) == read  # of what the kernel reads
    stored = [v.const_value for name, v in model.graph.initializers.items() if name.startswith(("m.", "zero_points."))]
    sizes = [tensor.nbytes for tensor in stored if tensor is not None and tensor.dtype != ir.DataType.INT64]  # of shapes
    assert 0 <= sum(sizes) - linear.nbytes < 8  # planes have the same length


@pytest.mark.parametrize("scale", [0.1, 1e-6, 1e6])
def test_what_half_would_change_stays_float32(scale: float) -> None:
    linear = round_to_nearest("m", WEIGHT, 4, 32, False)
    scales = linear.scales.copy()
    scales[3, 1] = scale  # between two numbers of float16, below its smallest, above its largest
    other = PackedLinear("m", linear.shape, 4, 32, linear.codes, scales, linear.zeros)
    model = graph_of(other)
    before = outputs(model)
    keep_scales_in_half(model)
    assert model.graph.initializers["m.scales"].const_value.dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
    assert np.array_equal(outputs(model), before) and other.nbytes == linear.nbytes + 2 * scales.size


def test_scales_are_rounded_to_what_half_holds() -> None:
    scales = np.exp(np.random.default_rng(1).uniform(np.log(2e-5), np.log(6e4), 5000)).astype(np.float32)
    nearest, above = in_half(scales), in_half(scales, up=True)
    assert fit_half(nearest) and fit_half(above) and (above >= scales * np.float32(1 - 1e-6)).all()
    assert np.abs(nearest / scales - 1).max() < 0.004 and np.abs(above / scales - 1).max() < 0.004
    assert np.array_equal(in_half(nearest, up=True), nearest)
    off = np.array([1e-5, 1e-7, 7e-6], dtype=np.float32)
    assert np.array_equal(in_half(off), off) and np.array_equal(in_half(-nearest), -nearest)
    assert in_half(np.array([7e4], dtype=np.float32))[0] == np.float32(7e4)


def test_a_group_of_next_to_nothing_does_not_cost_its_matrix_two_bytes_a_scale() -> None:
    """An untrained token among others: its weights are lost, which is nothing beside a step of the others."""
    weight = WEIGHT.copy()
    weight[5] *= 1e-7
    for bits in (4, 8):
        linear = round_to_nearest("m", weight, bits, 32, bits == 8)
        assert fit_half(linear.scales) and np.abs(linear.dequantized() - weight)[5].max() < 2**-16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_does_not_make_a_matrix_of_small_weights_coarse(bits: int) -> None:
    """Its scale, which nothing reads, once counted as a large one, to which those of the others were nothing."""
    small = WEIGHT * np.float32(1e-5)
    with_zeros = np.concatenate([small, np.zeros((1, 128), np.float32)])
    for symmetric in (False, True):
        whole = round_to_nearest("m", with_zeros, bits, 32, symmetric).dequantized()
        assert np.array_equal(whole[:-1], round_to_nearest("m", small, bits, 32, symmetric).dequantized()) and not whole[-1].any()


def test_rows_that_are_rounded_apart_have_scales_of_one_size() -> None:
    """The last rows of a head are tokens that no one trained: were theirs float32, all scales of the head would be."""
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(4096 + 64, 64)).astype(np.float32))
    weight[4096:] *= 1e-6
    assert fit_half(round_to_nearest("m", weight, 8, 64, False).scales)
    order, factor = torch.arange(64), torch.eye(64)
    of_all = least_largest_scale(weight, 4)
    assert fit_half(quantized("m", weight[4096:], factor, order, 4, 64, largest=of_all).scales)
    assert not fit_half(quantized("m", weight[4096:], factor, order, 4, 64).scales)


@pytest.mark.parametrize("step", [0.0123, 0.000731, 1.7])
def test_weights_that_lie_on_a_grid_of_half_scales_are_found_again(step: float) -> None:
    """As those of a GGUF file do: what float32 itself rounds must not make a scale the next larger one."""
    scale = np.float32(np.float16(step))
    codes = np.random.default_rng(2).integers(0, 16, (8, 64)).astype(np.float32)
    codes[:, 0], codes[:, 1] = 0, 15
    linear = round_to_nearest("m", (codes - 7) * scale, 4, 64, False)
    assert (linear.scales == scale).all() and np.array_equal(linear.unpacked(), codes)
