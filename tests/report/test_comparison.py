"""Artifacts against each other, and the names that they have in a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from edgepress.pipeline.report.comparison import comparisons, labels
from edgepress.pipeline.report.verdict import verdict
from made_up import PRUNED, WHOLE


def test_labels_differ() -> None:
    folders = [
        Path("/o/a/04-export"),
        Path("/o/b/04-export"),
        Path("/p/b/02-export"),
        Path("/o/a/04-export"),
        Path("/o/a/baseline/02-export"),
    ]
    assert labels(folders) == ["a", "o/b", "p/b", "a (2)", "baseline"]


def test_other_runs_are_not_compared_in_speed() -> None:
    other = replace(WHOLE, run="two")
    assert not comparisons([PRUNED, other]) and "speed not compared" in verdict([PRUNED, other])[0]


def test_comparisons_say_which_is_faster() -> None:
    by_figure = {c.figure: c for c in comparisons([PRUNED, WHOLE])}
    decode = by_figure["speed.decode_tokens_per_s"]
    assert decode.verdict == "slower" and decode.ratio == pytest.approx(0.8, rel=0.01)
    assert by_figure["memory.peak_rss_bytes"].verdict == "no difference shown"
