"""Artifacts against each other, from their reports alone: paired ratios, and whether an unpruned one does better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepress.pipeline.files import real
from edgepress.pipeline.report.forecast import DECODE, MEMORY, SIZE
from edgepress.pipeline.report.model import Comparison, Figure, Report
from edgepress.pipeline.report.stats import LEVEL, Ratio, ratio

# Figure -> the words for more and for less of it.
WORDS = {
    DECODE: ("faster", "slower"),
    "speed.prefill_tokens_per_s": ("faster", "slower"),
    "load.warm_s": ("slower", "faster"),
    MEMORY: ("larger", "smaller"),
}
# Files of this much difference in size count as equal.
EQUAL_SIZE = 1.02
# A speed-up counts as none when even the upper end of its interval is no more than this.
EQUAL_SPEED = 1.05


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, all different: the folder's name, its build's for ``BUILD/04-export``, longer where needed."""
    paths = [tuple(p for p in real(f).parts if not re.match(r"\d\d-", p)) for f in folders]
    names: list[str] = []
    for path in paths:
        others = {other for other in paths if other != path}
        depth = next((d for d in range(1, len(path)) if all(path[-d:] != other[-d:] for other in others)), len(path))
        name = "/".join(path[-depth:])
        same = sum(known.partition(" (")[0] == name for known in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def compare(report: Report, baseline: Report, figure: str) -> Ratio | None:
    """``report`` over ``baseline``, paired by round; None unless both were measured in the same interleaved run."""
    return _paired(report.figures, baseline.figures, figure) if report.run == baseline.run else None


def against_original(report: Report, figure: str) -> Ratio | None:
    """``report`` over the original that plain transformers ran, paired by round; None where either was not measured."""
    return _paired(report.figures, report.original.figures, figure) if report.original else None


def _paired(ours: Mapping[str, Figure], theirs: Mapping[str, Figure], figure: str) -> Ratio | None:
    if figure not in ours or figure not in theirs:
        return None
    first, second = ours[figure].values, theirs[figure].values
    rounds = min(len(first), len(second))  # one that crashed has fewer, and so has the original
    return ratio(first[:rounds], second[:rounds])


def comparisons(reports: Sequence[Report]) -> tuple[Comparison, ...]:
    """Every further artifact against the first, figure by figure."""
    first, *others = reports
    pairs = [(other, figure) for other in others for figure in first.figures]
    return tuple(made for other, figure in pairs if (made := _comparison(other, first, figure)))


def _comparison(report: Report, baseline: Report, figure: str) -> Comparison | None:
    words = WORDS.get(re.sub(r"\.\d+$", "", figure))  # the figure may end in a prompt length
    result = compare(report, baseline, figure) if words else None
    if not words or not result:
        return None
    low, high, level = (result.low, result.high, LEVEL) if result.rounds > 1 else (None, None, None)
    names = (report.artifact, baseline.artifact, figure)
    return Comparison(*names, result.value, result.rounds, result.verdict(*words), low, high, level)


def loss(report: Report) -> tuple[str, float] | None:
    """The figure that shows quality best, and its value: KL against the original, else perplexity."""
    for name in ("quality.kl_mean", "quality.perplexity"):
        if name in report.figures:
            return name, report.figures[name].median
    return None


def losing(report: Report, baseline: Report) -> list[str]:
    """At what ("size", "speed") an unpruned baseline is as good as a pruned artifact while it loses less."""
    ours, theirs = loss(report), loss(baseline)
    if not report.removed or baseline.removed or ours is None or theirs is None or ours[0] != theirs[0]:
        return []
    if theirs[1] >= ours[1]:
        return []
    result = []
    if baseline.figures[SIZE].median <= EQUAL_SIZE * report.figures[SIZE].median:
        result.append("size")
    decode = compare(report, baseline, DECODE)
    if decode and decode.rounds > 1 and decode.high <= EQUAL_SPEED:  # shown to be no faster, which is more than not shown to be
        result.append("speed")
    return result
