"""Artifacts against each other, from their reports alone: paired ratios, the frontier, and the verdict on pruning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepress.pipeline.report.stats import LEVEL, Ratio, ratio

# Figure -> the words for more and for less of it.
WORDS = {
    "speed.decode_tokens_per_s": ("faster", "slower"),
    "speed.prefill_tokens_per_s": ("faster", "slower"),
    "load.warm_s": ("slower", "faster"),
    "memory.peak_rss_bytes": ("larger", "smaller"),
}
# Files of this much difference in size count as equal.
EQUAL_SIZE = 1.02
# A speed-up counts as none when even the upper end of its interval is no more than this.
EQUAL_SPEED = 1.05


def labels(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder, all different: its own, its build's for ``BUILD/04-export``, longer where needed."""
    parts = [tuple(p for p in f.resolve().parts if not re.match(r"\d\d-", p)) for f in folders]
    names: list[str] = []
    for own in parts:
        others = {other for other in parts if other != own}
        depth = next((d for d in range(1, len(own)) if all(own[-d:] != other[-d:] for other in others)), len(own))
        name = "/".join(own[-depth:])
        same = sum(known.partition(" (")[0] == name for known in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def compare(ours: dict[str, Any], theirs: dict[str, Any], figure: str) -> Ratio | None:
    """``ours`` over ``theirs``, paired by round; None unless both were measured in the same interleaved run."""
    mine, other = ours["figures"].get(figure), theirs["figures"].get(figure)
    if mine is None or other is None or ours["run"] != theirs["run"]:
        return None
    rounds = min(len(mine["values"]), len(other["values"]))  # one that crashed has fewer
    return ratio(mine["values"][:rounds], other["values"][:rounds])


def words(figure: str) -> tuple[str, str] | None:
    """The words for a figure's name, its prompt length left out."""
    return WORDS.get(re.sub(r"\.\d+$", "", figure))


def comparisons(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every further artifact against the first, figure by figure."""
    found = []
    for other in reports[1:]:
        for figure in reports[0]["figures"]:
            said = words(figure)
            result = compare(other, reports[0], figure) if said else None
            if said and result:
                found.append(
                    {
                        "artifact": other["artifact"],
                        "than": reports[0]["artifact"],
                        "figure": figure,
                        "ratio": result.value,
                        "rounds": result.rounds,
                        "verdict": result.verdict(*said),
                        **({"low": result.low, "high": result.high, "level": LEVEL} if result.rounds > 1 else {}),
                    }
                )
    return found


def removed_layers(report: dict[str, Any]) -> list[int]:
    """Layers that its prune steps removed."""
    return [layer for step in report["steps"] for layer in step["facts"].get("removed_layers", [])]


def quantized_as(report: dict[str, Any]) -> dict[str, Any]:
    """The options of its quantize step that decide the format."""
    step: dict[str, Any] = next((s for s in report["steps"] if s["stage"] == "quantize"), {"options": {}})
    return {k: v for k, v in step["options"].items() if k in ("method", "bits", "group_size", "head_bits", "symmetric")}


def loss(report: dict[str, Any]) -> tuple[str, float] | None:
    """The figure that tells quality best, and its value: KL against the original, else perplexity."""
    for name in ("quality.kl_mean", "quality.perplexity"):
        if name in report["figures"]:
            return name, report["figures"][name]["median"]
    return None


def losing(report: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """At what ("size", "speed") an unpruned baseline is as good as a pruned artifact while it loses less."""
    ours, theirs = loss(report), loss(baseline)
    if not removed_layers(report) or removed_layers(baseline) or ours is None or theirs is None or ours[0] != theirs[0]:
        return []
    if theirs[1] >= ours[1]:
        return []
    found = []
    bytes_of = [r["figures"]["size.total_bytes"]["median"] for r in (report, baseline)]
    if bytes_of[1] <= EQUAL_SIZE * bytes_of[0]:
        found.append("size")
    decode = compare(report, baseline, "speed.decode_tokens_per_s")
    if decode and decode.rounds > 1 and decode.high <= EQUAL_SPEED:  # shown to be no faster, which is more than not shown to be
        found.append("speed")
    return found
