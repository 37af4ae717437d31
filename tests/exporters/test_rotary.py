"""Long rotary tables are multiplied out by onnxruntime; short ones, and those of float16 graphs, are stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.rotary import LONG, STEP, rotary_values


def tables(positions: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of heads of 128, as Gemma 3 and YaRN (which scales them) have."""
    angles = np.arange(positions)[:, None] * 1e6 ** (-np.arange(64) / 64)
    return (scale * np.cos(angles)).astype(np.float32), (scale * np.sin(angles)).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_products_are_the_tables(scale: float) -> None:
    cos, sin = tables(32768, scale)
    b = Builder()
    for value, name in zip(rotary_values(b, ".full", cos, sin), ("cos", "sin"), strict=True):
        assert value is not None
        b.output(value, name, ir.DataType.FLOAT, cos.shape)
    assert sum(v.const_value.nbytes for v in b.initializers.values() if v.const_value) < cos.nbytes / 40
    session = onnxruntime.InferenceSession(ir.to_proto(b.model({})).SerializeToString(), providers=["CPUExecutionProvider"])
    for table, values in zip((cos, sin), session.run(None, {}), strict=True):
        assert np.abs(table - values).max() < 3e-7 * scale


@pytest.mark.parametrize(("positions", "kind"), [(256, "FLOAT"), (32768, "FLOAT16"), (LONG // 256 + STEP // 2, "FLOAT")])
def test_other_tables_are_stored(positions: int, kind: str) -> None:
    """Short ones, those of float16 graphs, and lengths that no fine table divides."""
    cos, sin = tables(positions, 1.0)
    b = Builder(ir.DataType[kind])
    values = rotary_values(b, "", cos, sin)
    assert not b.nodes and [value and value.shape for value in values] == [cos.shape, sin.shape]
