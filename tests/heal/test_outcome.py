"""A healing is kept only where both texts improve, and the manifest records what the checkpoint holds."""

from __future__ import annotations

import math

import pytest
from edgepress.pipeline.heal.outcome import Change, Outcome
from edgepress.pipeline.heal.stage import HEALERS
from edgepress.pipeline.options import HEALERS as CHOICES

BETTER, WORSE = Change(2.0, 1.0), Change(1.0, 2.0)


@pytest.mark.parametrize(
    ("changed", "held_out", "other", "accepted"),
    [
        (1, BETTER, BETTER, True),
        (1, BETTER, WORSE, False),
        (1, WORSE, BETTER, False),
        (1, Change(2.0, math.nan), BETTER, False),
        (0, BETTER, BETTER, False),
    ],
)
def test_kept_only_if_both_texts_improve(changed: int, held_out: Change, other: Change, accepted: bool) -> None:
    assert Outcome("linear", changed, held_out, other, {}).accepted == accepted


def test_a_rejected_healing_is_recorded_under_names_of_its_own() -> None:
    """The figures of the checkpoint stay those before; what was rejected has names of its own."""
    facts = Outcome("lora", 3, BETTER, WORSE, {"rank": 4}).facts()
    assert list(facts) == [
        "method", "accepted", "changed_tensors", "rejected_held_out_perplexity", "rejected_other_perplexity",
        "held_out_perplexity", "other_perplexity", "rank",
    ]  # fmt: skip
    assert facts["rejected_other_perplexity"] == [pytest.approx(math.e, abs=1e-4), pytest.approx(math.e**2, abs=1e-4)]
    assert facts["other_perplexity"] == [facts["rejected_other_perplexity"][0]] * 2
    assert list(Outcome("lora", 3, BETTER, BETTER, {}).facts())[3:] == ["held_out_perplexity", "other_perplexity"]


def test_every_choice_of_healer_is_in_the_table() -> None:
    assert {name for choice in CHOICES for name in choice.split("+")} - {"none"} == set(HEALERS)
