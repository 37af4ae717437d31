"""Statistics of samples: ratios with their confidence interval, and the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, two-sided 99 %, by degrees of freedom from 1; beyond the table the last one, which is on the safe side.
# 99 and not 95: a report makes dozens of comparisons, and none of them may be chance.
_T99 = (63.657, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.250, 3.169, 3.106, 3.055, 3.012, 2.977, 2.947, 2.921,
        2.898, 2.878, 2.861, 2.845)  # fmt: skip
LEVEL = 0.99
WIDEST = 20.0  # an interval whose ends are further apart, as of two samples, tells nothing


@dataclass(frozen=True)
class Ratio:
    """How many times ``ours`` is ``theirs``, with an interval of LEVEL; ``rounds`` is the number of pairs behind it."""

    value: float
    low: float
    high: float
    rounds: int

    def verdict(self, more: str, less: str) -> str:
        """``more`` or ``less`` only when the interval lies wholly on that side of 1."""
        return more if self.low > 1 else less if self.high < 1 else "no difference shown"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Geometric mean of the ratios of samples paired by round, with Student's interval on their logarithms.

    Pairing takes out what both met in the same round (another program, a warmer chip). One round has no interval:
    it runs from 0 to infinity. Raises ValueError for samples that do not pair.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} samples do not pair with {len(theirs)}")
    logs = np.log(np.asarray(ours, dtype=np.float64)) - np.log(np.asarray(theirs, dtype=np.float64))
    count, mean = len(logs), float(logs.mean())
    if count < 2:
        return Ratio(_exp(mean), 0.0, math.inf, count)
    half = _T99[min(count - 1, len(_T99)) - 1] * float(logs.std(ddof=1)) / math.sqrt(count)
    return Ratio(_exp(mean), _exp(mean - half), _exp(mean + half), count)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other point beats in one without being worse in the other, by cost."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    best: list[int] = []
    for index in order:
        if not best or points[index][1] < points[best[-1]][1]:
            best.append(index)
    return best
