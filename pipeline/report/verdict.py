"""The first lines of a report: what failed, what is suspect, and whether removing layers was worth it. Never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.report.comparison import compare, losing, loss, quantized_as, removed_layers
from edgepress.pipeline.report.stats import Ratio
from edgepress.pipeline.report.tables import shown
from edgepress.pipeline.vocabulary import PAST_TENSE

FEW = 3
HURT = {
    PAST_TENSE["prune"]: "where layers were removed: remove fewer or none, and heal with text of its own kind",
    PAST_TENSE["heal"]: "in healing: heal with text of its own kind",
    PAST_TENSE["quantize"]: "in quantization: give more bits, or calibrate GPTQ with text of its own kind",
}
LOSS_NAMES = {"quality.kl_mean": "KL", "quality.perplexity": "perplexity"}


def verdict(reports: Sequence[dict[str, Any]]) -> list[str]:
    """One line a finding, the worst first."""
    return [*_failures(reports), *_suspects(reports), *_hurt(reports), *_pruning(reports), *_pressed(reports)]


def _failures(reports: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{r['artifact']} could not be measured ({what}): {why}" for r in reports for what, why in r["failed"].items()]


def _suspects(reports: Sequence[dict[str, Any]]) -> list[str]:
    names = {"onnx": "the artifact as shipped", "onnx_level_0": "the artifact, even at float activations,"}
    return [
        f"{r['artifact']}: {names.get(row['name'], row['name'])} is suspect: {row['suspect']}"
        for r in reports
        for row in r["stages"]
        if "suspect" in row
    ]


def _hurt(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What nobody should ship, and the stage that it comes from."""
    lines = []
    for report in reports:
        rows = {row["name"].rstrip("'"): row for row in report["stages"] if "failed" not in row}
        if not {"original", "onnx"} <= set(rows) or not rows["onnx"]["perplexity"] > WORRYING * rows["original"]["perplexity"]:
            continue
        guilty = max(rows, key=lambda name: rows[name].get("share", 0.0))
        if guilty == "onnx" and "onnx_level_0" in rows:
            where = "most of it to int8 activations: export with --accuracy-level 0"
        elif guilty in HURT:
            where = f"most of it {HURT[guilty]}"
        else:  # a row that stands for several stages
            where = "and the checkpoints in between (--stages) would show where"
        lines.append(
            f"{report['artifact']} is badly hurt, too much to be of use: perplexity {rows['original']['perplexity']:.4g} to "
            f"{rows['onnx']['perplexity']:.4g}, {where}"
        )
    return lines


def _pruning(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Losses first, then what removal gained, each against an artifact without removal."""
    lost, gained = [], []
    whole = [r for r in reports if not removed_layers(r)]
    for report in filter(removed_layers, reports):
        worse = [(other, at) for other in whole if (at := losing(report, other))]
        if worse:
            lost.append(_lost(report, *_hardest(report, worse)))
            continue
        same = next((r for r in whole if quantized_as(r) == quantized_as(report) and not r["failed"]), None)
        if same is not None and not report["failed"]:
            gained.append(_gained(report, same))
        elif not report["failed"]:
            gained.append(
                f"{report['artifact']}: nothing without removal was measured beside it, so nothing shows what removal is worth"
            )
    return lost + gained


def _hardest(report: dict[str, Any], worse: list[tuple[dict[str, Any], list[str]]]) -> tuple[dict[str, Any], list[str]]:
    """Of the baselines that win: one at both size and speed, of the same format, of the least loss; in this order."""
    return min(worse, key=lambda pair: (-len(pair[1]), quantized_as(pair[0]) != quantized_as(report), loss(pair[0])))


def _lost(report: dict[str, Any], other: dict[str, Any], at: list[str]) -> str:
    reasons = []
    if "size" in at:
        sizes = [shown(r["figures"]["size.total_bytes"]["median"], "byte") for r in (other, report)]
        larger = other["figures"]["size.total_bytes"]["median"] > report["figures"]["size.total_bytes"]["median"]
        reasons.append(f"is {'as small within 2 %' if larger else 'no larger'} ({sizes[0]} against {sizes[1]})")
    if "speed" in at:
        reasons.append(f"is no slower ({report['artifact']} against it: {_times(report, other)})")
    return (
        f"Pruning loses in {report['artifact']}: {other['artifact']}, with all layers, {' and '.join(reasons)}, "
        f"and loses less ({_losses(other, report)})"
    )


def _gained(report: dict[str, Any], same: dict[str, Any]) -> str:
    sizes = [r["figures"]["size.total_bytes"]["median"] for r in (report, same)]
    ratio = compare(report, same, "speed.decode_tokens_per_s")
    said = "speed not compared" if ratio is None else f"{ratio.verdict('faster', 'slower')} ({_times(report, same)})"
    if said.startswith("no difference"):
        said = f"no difference in speed shown ({_times(report, same)})"
    count = len(removed_layers(report))
    return (
        f"{report['artifact']}: without {count} layer{'s'[: count != 1]} "
        f"{100 * (1 - sizes[0] / sizes[1]):.1f} % smaller and {said} "
        f"against {same['artifact']}, the same with all layers, at {_losses(report, same)}"
    )


def _times(report: dict[str, Any], other: dict[str, Any]) -> str:
    ratio = compare(report, other, "speed.decode_tokens_per_s")
    return "" if ratio is None else f"decode {times(ratio)}"


def times(ratio: Ratio) -> str:
    """``1.12x, 1.05 to 1.20``."""
    interval = f", {ratio.low:.4g} to {ratio.high:.4g}" if ratio.rounds > 1 else ", one round: no interval"
    return f"{ratio.value:.4g}x{interval}"


def _losses(first: dict[str, Any], second: dict[str, Any]) -> str:
    ours, theirs = loss(first), loss(second)
    if ours is None or theirs is None:
        return "quality not measured"
    return f"{LOSS_NAMES[ours[0]]} {ours[1]:.3g} against {theirs[1]:.3g}"


def _pressed(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What became of the original, for each artifact that was scored with it; of more than a few the table tells enough."""
    lines: list[str] = []
    if len(reports) > FEW:
        return lines
    for report in reports:
        rows = {row["name"]: row for row in report["stages"] if "failed" not in row}
        if {"original", "onnx"} <= set(rows):
            before, after = rows["original"], rows["onnx"]
            change = 100 * (after["perplexity"] / before["perplexity"] - 1)
            lines.append(
                f"{report['artifact']}: weights {shown(before['bytes'], 'byte')} to {shown(after['bytes'], 'byte')}, "
                f"perplexity {before['perplexity']:.4g} to {after['perplexity']:.4g} ({change:+.1f} %)"
            )
    return lines
