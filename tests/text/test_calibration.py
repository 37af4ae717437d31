"""Disjoint sets of windows from one text."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgepress.pipeline.options import HealOptions, PruneOptions
from edgepress.pipeline.text.calibration import calibration, healing_sets


def test_the_five_sets_share_no_window(reference: Path) -> None:
    """What heals never judges."""
    texts = healing_sets(reference, HealOptions(original=reference, calibration_tokens=6000))
    sets = [{row.tobytes() for row in getattr(texts, name)} for name in ("fit", "selection", "judging", "other_selection", "other")]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize("budget", [300, 514, 1025, 2048, 4096, 5000])
def test_a_quarter_of_the_text_is_held_out(budget: int, reference: Path) -> None:
    """Whatever the number of tokens: a ragged last window must not be all that judges."""
    ranking, held_out = calibration(reference, PruneOptions(remove_count=1, calibration_tokens=budget))
    tokens = sum(map(len, ranking)) + sum(map(len, held_out))
    assert 0.2 <= sum(map(len, held_out)) / tokens <= 0.3 and tokens > 0.75 * budget
