"""The first lines of a report: what failed, what is suspect, and whether removing layers was worth it. Never guessed."""

from __future__ import annotations

from collections.abc import Sequence

from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.report.comparison import compare, losing, loss
from edgepress.pipeline.report.forecast import DECODE, SIZE
from edgepress.pipeline.report.model import Report
from edgepress.pipeline.report.stats import WIDEST, Ratio
from edgepress.pipeline.report.tables import shown
from edgepress.pipeline.vocabulary import PAST_TENSE

FEW = 3
BUSY = 2  # load average a core
HEAVY = 50e6  # bytes read a token
SLOW, EXPECTED = 0.25, 0.6  # shares of the memory's bandwidth: called out below the first, most graphs reach the second
HURT = {
    PAST_TENSE["prune"]: "where layers were removed: remove fewer or none, and heal with text of the same kind",
    PAST_TENSE["heal"]: "in healing: heal with text of the same kind",
    PAST_TENSE["narrow"]: "where channels were removed: give a smaller --remove-channels",
    PAST_TENSE["quantize"]: "in quantization: give more bits, or calibrate with text of the same kind",
    PAST_TENSE["tune"]: "in tuning: leave it out, or tune with text of the same kind",
}
LOSS_NAMES = {"quality.kl_mean": "KL", "quality.perplexity": "perplexity"}


def verdict(reports: Sequence[Report]) -> list[str]:
    """One line a finding, the worst first."""
    findings = (_failures, _suspects, _hurt, _bounds, _busy, _slow, _pruning, _pressed)
    return [line for find in findings for line in find(reports)]


def _failures(reports: Sequence[Report]) -> list[str]:
    return [f"{r.artifact} could not be measured ({what}): {why}" for r in reports for what, why in r.failed.items()]


def _bounds(reports: Sequence[Report]) -> list[str]:
    """Whether what a build was asked to keep to is kept to."""
    lines = []
    for report in reports:
        if report.forecast and report.forecast.bounds:
            given = " and ".join(f"{bound.flag} {bound.given}" for bound in report.forecast.bounds)
            kept = f"{report.artifact} keeps to {given}, as measured"
            if machine := report.forecast.machine:
                kept = f"{report.artifact} was planned for {given} on {machine}; the speeds and memory here are another machine's"
            lines += report.missed(report.forecast) or [kept]
    return lines


def _busy(reports: Sequence[Report]) -> list[str]:
    """Speeds that were measured beside much other work. A build's own work before it counts as one to a core."""
    lines = []
    for run in {report.run: report.environment for report in reports}.values():
        if run.load_average is not None and run.load_average > BUSY * run.cores:
            lines.append(
                f"measured while other programs were busy (load average {run.load_average:g} on {run.cores} cores before): speeds "
                "are too low and their intervals wide; run edgepress bench again on a quiet machine"
            )
    return lines


def _slow(reports: Sequence[Report]) -> list[str]:
    """Artifacts that decode far below what their bytes promise, and the likely cause.

    Only where the weights are large enough to decide the speed: small ones wait for the dispatch of operators.
    """
    lines = []
    for report in reports:
        names = ("speed.bandwidth_fraction", "speed.bytes_per_token", DECODE)
        used, read, speed = (report.figures.get(name) for name in names)
        if used is None or read is None or speed is None or read.median < HEAVY or used.median >= SLOW:
            continue
        decode = speed.median
        lines.append(
            f"{report.artifact} decodes at {100 * used.median:.0f} % of the memory's bandwidth, {decode:.3g} tokens/s where its "
            f"bytes promise about {EXPECTED * decode / used.median:.3g}: {_cause(report)}"
        )
    return lines


def _cause(report: Report) -> str:
    export = next((step.export for step in reversed(report.steps) if step.export), None)
    if export is not None and export.exporter == "portable":
        return "the portable graph copies its cache at every token"
    if export is not None and export.target == "web":
        return "its operators are those of a browser; for this processor export with --target cpu"
    if export is not None and export.accuracy_level == 0:
        return "float activations have no fast kernel for its bits here; export with --accuracy-level auto or 4"
    return "its operators are slow on this processor, or other programs were busy"


def _suspects(reports: Sequence[Report]) -> list[str]:
    names = {"onnx": "the artifact as shipped", "onnx_level_0": "the artifact, even at float activations,"}
    return [
        f"{r.artifact}: {names.get(row.name, row.name)} is suspect: {row.suspect}"
        for r in reports
        for row in r.stages
        if row.suspect
    ]


def unfit(report: Report) -> bool:
    """Whether nobody should ship it: it could not be measured, computes something else, or is of little use."""
    return bool(report.failed) or any(row.suspect for row in report.stages) or is_degraded(report)


def is_degraded(report: Report) -> bool:
    """Whether perplexity grew so much that little use is left."""
    scored = report.perplexities
    return {"original", "onnx"} <= set(scored) and scored["onnx"] > WORRYING * scored["original"]


def _hurt(reports: Sequence[Report]) -> list[str]:
    """What is badly degraded, and the stage that it comes from."""
    lines = []
    for report in filter(is_degraded, reports):
        scored = report.perplexities
        shares = {row.name.rstrip("'"): row.share or 0.0 for row in report.stages if row.failed is None}
        worst = max(shares, key=lambda name: shares[name])
        if worst == "onnx" and "onnx_level_0" in shares:
            where = "most of it by int8 activations: export with --accuracy-level 0"
        elif worst in HURT:
            where = f"most of it {HURT[worst]}"
        else:  # a row that stands for several stages
            where = "and the checkpoints in between (--stages) would show where"
        lines.append(
            f"{report.artifact} is badly degraded, too much to be of use: perplexity {scored['original']:.4g} to "
            f"{scored['onnx']:.4g}, {where}"
        )
    return lines


def _pruning(reports: Sequence[Report]) -> list[str]:
    """Losses first, then what removal gained, each against an artifact without removal."""
    lost, gained = [], []
    whole = [r for r in reports if not r.removed]
    for report in (r for r in reports if r.removed):
        better = [(other, at) for other in whole if (at := losing(report, other))]
        if better:
            lost.append(_lost(report, *_clearest(report, better)))
            continue
        same = next((r for r in whole if r.quantization == report.quantization and not r.failed), None)
        if same is not None and not report.failed:
            gained.append(_gained(report, same))
        elif not report.failed:
            gained.append(
                f"{report.artifact}: nothing without removal was measured with it, so nothing shows what removal is worth"
            )
    return lost + gained


def _clearest(report: Report, better: list[tuple[Report, list[str]]]) -> tuple[Report, list[str]]:
    """Of the baselines that win: one at both size and speed, of the same format, of the least loss; in this order."""
    return min(better, key=lambda pair: (-len(pair[1]), pair[0].quantization != report.quantization, loss(pair[0])))


def _lost(report: Report, other: Report, at: list[str]) -> str:
    reasons = []
    if "size" in at:
        theirs, ours = (r.figures[SIZE].median for r in (other, report))
        size = "as small within 2 %" if theirs > ours else "no larger"
        reasons.append(f"is {size} ({shown(theirs, 'byte')} against {shown(ours, 'byte')})")
    if "speed" in at:
        reasons.append(f"is no slower ({report.artifact} against it: {_times(report, other)})")
    return (
        f"Pruning does not pay off in {report.artifact}: {other.artifact} keeps {_all(report)}, {', '.join(reasons)} "
        f"and has the better quality ({_losses(other, report)})"
    )


def _gained(report: Report, same: Report) -> str:
    smaller = 100 * (1 - report.figures[SIZE].median / same.figures[SIZE].median)
    return (
        f"{report.artifact}: without {report.removed} {smaller:.1f} % smaller and {_speed(report, same)} "
        f"against {same.artifact}, the same with {_all(report)}, at {_losses(report, same)}"
    )


def _all(report: Report) -> str:
    whole = " whole" * bool(report.parts_removed)
    return f"all layers{whole} and channels" if report.channels_removed else f"all layers{whole}"


def _speed(report: Report, same: Report) -> str:
    ratio = compare(report, same, DECODE)
    if ratio is None:
        return "speed not compared"
    words = ratio.verdict("faster", "slower")
    return f"{words if words in ('faster', 'slower') else 'no difference in speed shown'} ({_times(report, same)})"


def _times(report: Report, other: Report) -> str:
    ratio = compare(report, other, DECODE)
    return "" if ratio is None else f"decode {times(ratio)}"


def times(ratio: Ratio) -> str:
    """``1.12x, 1.05 to 1.20``."""
    return f"{ratio.value:.4g}x, {interval(ratio)}"


def interval(ratio: Ratio, digits: int = 4, name: str = "") -> str:
    """``1.05 to 1.20``, with a name before it, or why there is none."""
    if ratio.rounds > 1 and ratio.high > WIDEST * ratio.low:
        return f"{ratio.rounds} rounds: too few for an interval"
    return f"{name}{ratio.low:.{digits}g} to {ratio.high:.{digits}g}" if ratio.rounds > 1 else "one round: no interval"


def _losses(first: Report, second: Report) -> str:
    ours, theirs = loss(first), loss(second)
    if ours is None or theirs is None:
        return "quality not measured"
    return f"{LOSS_NAMES[ours[0]]} {ours[1]:.3g} against {theirs[1]:.3g}"


def _pressed(reports: Sequence[Report]) -> list[str]:
    """What became of the original, for each artifact that was scored with it; with more than a few, the table is enough."""
    if len(reports) > FEW:
        return []
    lines = []
    for report in reports:
        scored = report.perplexities
        if {"original", "onnx"} <= set(scored):
            before, after = scored["original"], scored["onnx"]
            sizes = {row.name: shown(row.bytes, "byte") for row in report.stages}
            file = next((step.imported.file_bytes for step in report.steps if step.imported), 0)
            given = f"{sizes['original']} in float" + (f" (a GGUF file of {shown(file, 'byte')})" if file else "")
            lines.append(
                f"{report.artifact}: weights {given} to {sizes['onnx']}, "
                f"perplexity {before:.4g} to {after:.4g} ({100 * (after / before - 1):+.1f} %)"
            )
    return lines
