"""Intervals of ratios, and the Pareto frontier."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edgepress.pipeline.report.stats import Ratio, frontier, ratio
from edgepress.pipeline.report.verdict import times


def test_interval_of_a_ratio_is_students() -> None:
    """Against scipy, which the project does without."""
    scipy_stats = pytest.importorskip("scipy.stats")
    ours, theirs = np.array([10.0, 11.0, 12.5, 9.5, 10.5]), np.array([9.0, 9.5, 9.0, 9.2, 8.8])
    logs = np.log(ours / theirs)
    low, high = scipy_stats.t.interval(0.99, 4, loc=logs.mean(), scale=logs.std(ddof=1) / math.sqrt(5))
    result = ratio(ours.tolist(), theirs.tolist())
    assert (result.value, result.low, result.high) == pytest.approx(
        (math.exp(logs.mean()), math.exp(low), math.exp(high)), rel=1e-4
    )
    assert result.rounds == 5


def test_verdict_is_never_guessed() -> None:
    """Noise, one round and equal samples show nothing; a steady lead does, in both directions."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        ours, theirs = np.exp(random.normal(0, 0.1, (2, 5)))
        wrong += ratio(ours.tolist(), theirs.tolist()).verdict("faster", "slower") != "no difference shown"
    assert wrong <= 12  # 1 % of 300 is expected
    assert ratio([2.0], [1.0]).verdict("faster", "slower") == "no difference shown"
    assert ratio([1.0] * 5, [1.0] * 5).verdict("faster", "slower") == "no difference shown"
    fast, slow = [1.25, 1.24, 1.26, 1.25, 1.23], [1.0, 1.01, 0.99, 1.0, 1.0]
    assert ratio(fast, slow).verdict("faster", "slower") == "faster"
    assert ratio(slow, fast).verdict("faster", "slower") == "slower"
    assert ratio([1e300, 1.0], [1e-300, 1.0]).high == float("inf")


def test_pairing_takes_out_what_both_met() -> None:
    """Rounds that differ threefold between each other hide nothing when both samples of a round share them."""
    rounds = np.array([1.0, 3.0, 0.8, 2.0, 1.5])
    assert ratio((1.1 * rounds).tolist(), rounds.tolist()).low > 1.09
    with pytest.raises(ValueError, match="do not pair"):
        ratio([1.0, 2.0], [1.0])


def test_frontier() -> None:
    """Only what nothing else beats at its cost."""
    assert frontier([(1, 5), (2, 3), (3, 4), (4, 1), (2, 6)]) == [0, 1, 3]


def test_a_ratio_lies_in_its_interval() -> None:
    assert times(Ratio(1.0254, 1.0232, 1.0278, 5)) == "1.025x, 1.023 to 1.028"
