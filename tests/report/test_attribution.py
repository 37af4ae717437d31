"""Which stage lost what, from made-up losses."""

from __future__ import annotations

import numpy as np
import pytest
from edgepress.pipeline.report.attribution import attribute
from edgepress.pipeline.report.model import StageRow


def rows_of(*losses: np.ndarray | None) -> tuple[StageRow, ...]:
    """Five stages of which the export must equal what was quantized, attributed."""
    names = ["original", "pruned", "quantized", "onnx_level_0", "onnx"]
    rows = [
        StageRow(name, 100, failed="killed") if loss is None else StageRow(name, 100, perplexity=float(np.exp(loss.mean())))
        for name, loss in zip(names, losses, strict=True)
    ]
    return attribute(rows, losses, {"onnx_level_0": "quantized"})


def test_shares_sum_to_the_whole_loss() -> None:
    base = np.random.default_rng(0).uniform(1, 5, 1000)
    losses = [base, base + 0.3, base + 0.4, base + 0.4, base + 0.401]
    rows = rows_of(*(x.astype(np.float32) for x in losses))
    assert [round(row.share, 3) for row in rows[1:]] == [0.748, 0.249, 0.0, 0.002]
    assert sum(row.share for row in rows[1:]) == pytest.approx(1)
    assert not any(row.suspect for row in rows)


def test_an_export_that_computes_something_else_is_suspect() -> None:
    """Even when the mean loss is the same to many digits: gains and losses of tokens cancel there."""
    base = np.random.default_rng(0).uniform(1, 5, 1000)
    wave = 0.01 * np.tile([1.0, -1.0], 500)
    losses = [base, base + 0.3, base + 0.4, base + 0.4 + wave, base + 0.4 + wave]
    rows = rows_of(*losses)
    assert [row.name for row in rows if row.suspect] == ["onnx_level_0"]
    assert "quantized" in rows[3].suspect and "damaged" in rows[3].suspect


def test_failed_row_breaks_no_chain() -> None:
    base = np.ones(100)
    rows = rows_of(base, None, base + 0.5, base + 0.5, base + 0.5)
    assert rows[2].change_nats == pytest.approx(0.5) and rows[1].share is None


def test_int8_activations_that_cost_much_are_suspect() -> None:
    base = np.random.default_rng(0).uniform(1, 5, 1000)
    rows = rows_of(base, base, base, base, base + 0.05)
    assert [row.name for row in rows if row.suspect] == ["onnx"] and "--accuracy-level 0" in rows[4].suspect
