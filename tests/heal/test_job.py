"""Gaps in a list of kept layers."""

from __future__ import annotations

from edgepress.pipeline.heal.job import Gap, gaps_of


def test_gaps_are_seen_from_both_models() -> None:
    """Each gap: the block before it in the pruned model, and the original block whose input that one must give."""
    assert gaps_of([0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15], 16) == [Gap(3, 6), Gap(6, 10)]
    assert gaps_of([2, 3], 6) == [Gap(-1, 2), Gap(1, 6)]
    assert gaps_of([0, 1], 2) == []
