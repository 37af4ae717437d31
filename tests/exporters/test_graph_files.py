"""Graphs on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import rows_in_place
from edgepress.pipeline.quantize.rtn import round_to_nearest


@pytest.mark.parametrize("tied", [True, False])
def test_rows_and_matrix_are_the_same_bytes(tied: bool, tmp_path: Path) -> None:
    """A tied matrix is on the disk once and the embedding a view of it: no Reshape that onnxruntime would fold into a copy."""
    weight = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    matrix = round_to_nearest("table", weight, 4, 32, False)
    b = Builder()
    hidden = b.embedding(b.input("ids", ir.DataType.INT64, ["n"]), matrix, "table")
    result = b.linear(hidden, matrix, "head", 0, weight_name="table") if tied else hidden
    b.output(result, "out", ir.DataType.FLOAT, ["n", 512 if tied else 64])
    ir.save(b.model({}), tmp_path / "model.onnx", external_data="model.onnx.data")
    graph = rows_in_place(tmp_path / "model.onnx").graph
    assert [n.op_type for n in graph] == ["GatherBlockQuantized", "MatMulNBits"][: 1 + tied]
    if tied:
        assert graph.initializers["table.B.rows"].const_value.offset == graph.initializers["table.B"].const_value.offset
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.5 * matrix.nbytes
    ids = np.array([3, 500, 3])
    output = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": ids})[0]
    rows = matrix.dequantized()[ids]
    assert np.allclose(output, rows @ matrix.dequantized().T if tied else rows, atol=1e-4)
