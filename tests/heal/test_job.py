"""Gaps in a list of kept layers."""

from __future__ import annotations

from edgepress.pipeline.heal.job import Gap, gaps_of


def test_gaps_are_seen_from_both_models() -> None:
    """Each gap: the block before it in the pruned model, and the original block whose input that one must give."""
    assert gaps_of([0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15], 16) == [Gap(3, 6), Gap(6, 10)]
    assert gaps_of([2, 3], 6) == [Gap(-1, 2), Gap(1, 6)]
    assert gaps_of([0, 1], 2) == []


def test_a_block_that_lacks_a_part_is_a_gap_of_its_own() -> None:
    """It has to give what the whole model's next block gets; without both parts it is as good as removed."""
    assert gaps_of([0, 1, 2, 3], 4, lacking={1, 3}) == [Gap(1, 2), Gap(3, 4)]
    assert gaps_of([0, 1, 4], 6, lacking={1}) == [Gap(1, 4), Gap(2, 6)]
    assert gaps_of([0, 1, 2, 3], 4, lacking={0}, empty={1, 3}) == [Gap(0, 2), Gap(2, 4)]
    assert gaps_of([0, 1], 2, empty={0}) == [Gap(-1, 1)]
