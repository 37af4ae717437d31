"""The line that a reader needs first: which of the artifacts to ship, or why none."""

from __future__ import annotations

from collections.abc import Sequence

from edgepress.pipeline.report.comparison import against_original, compare, losing
from edgepress.pipeline.report.forecast import DECODE, MEMORY, SIZE
from edgepress.pipeline.report.model import Report
from edgepress.pipeline.report.tables import prompt_length, shown
from edgepress.pipeline.report.verdict import interval, times, unfit

PREFILL = "speed.prefill_tokens_per_s."
LITTLE = 1.05  # of the original's perplexity: what the shipped recipes allow


def decision(reports: Sequence[Report]) -> str:
    """The smallest artifact that loses little, and the fastest where that is shown to be another; "" without an original.

    What failed, is suspect or badly degraded is no candidate. Where all lose more, the one that loses least is named.
    """
    scored = [report for report in reports if {"original", "onnx"} <= report.perplexities.keys()]
    if not scored:
        return ""
    fit = [report for report in scored if not unfit(report)]
    if not fit:
        whole = "none of these: what is wrong with each stands below"
        return f"Ship {whole}" if len(scored) > 1 else f"Do not ship {scored[0].artifact}"
    # One that was pruned in vain is no candidate, either: another is as good without.
    fit = [report for report in fit if not any(losing(report, other) for other in fit)]
    good = [report for report in fit if growth(report) <= LITTLE]
    if not good:
        least = min(fit, key=growth)
        others = "; all others lose more" if len(scored) > 1 else ""
        where = _where(least) or " only where size or speed matter more than quality"
        return f"Ship {least.artifact}{where}: {_figures(least)}{_gain(least)}{others}"
    best = min(good, key=lambda report: report.figures[SIZE].median)
    line = f"Ship {best.artifact}{_where(best)}: {_figures(best)}{_gain(best)}"
    if len(scored) > 1:
        line += f"; the smallest here that loses at most {100 * (LITTLE - 1):.0f} %"
    faster = [(ratio.value, report, ratio) for report in good if (ratio := compare(report, best, DECODE)) and ratio.low > 1]
    if faster:
        _, report, ratio = max(faster, key=lambda row: row[0])
        line += f". {report.artifact} where speed matters more: decode {times(ratio)}, {_figures(report)}"
    return line


def _where(report: Report) -> str:
    """Nobody who can run the file that it was made from wins by one that is larger and loses more."""
    size = report.smaller_source
    return "" if size is None else f" where ONNX is needed (the GGUF file, which is the original here, has {shown(size, 'byte')})"


def growth(report: Report) -> float:
    """Perplexity of the shipped files over the original's."""
    return report.perplexities["onnx"] / report.perplexities["original"]


def _gain(report: Report) -> str:
    """What its user wins over who runs the original by plain transformers; "" where that was not measured."""
    speed, memory = against_original(report, DECODE), against_original(report, MEMORY)
    if speed is None:
        return ""
    proven = speed.rounds > 1 and not speed.low <= 1 <= speed.high
    said = f"decodes {speed.value:.3g} times as fast as" if proven else f"{speed.value:.3g} times the decode rate of"
    known = interval(speed, 3, "99 % interval ")
    held = "" if memory is None else f", at {100 * memory.value:.0f} % of its memory"
    web = any(step.export.target == "web" for step in report.steps if step.export)
    held += ", by onnxruntime on the CPU: a browser is slower" if web else ""
    return f", {said} the original under transformers ({known}){_prompts(report)}{held}"


def _prompts(report: Report) -> str:
    """That the artifact reads prompts slower than the original, where it is shown to."""
    length = max((prompt_length(name) for name in report.figures if name.startswith(PREFILL)), default=0)
    rate = against_original(report, f"{PREFILL}{length}")
    if rate is None or rate.rounds < 2 or rate.high >= 1:
        return ""
    return f", reads a prompt of {length} tokens {rate.value:.2g} times as fast"


def _figures(report: Report) -> str:
    return f"{shown(report.figures[SIZE].median, 'byte')}, perplexity {100 * (growth(report) - 1):+.1f} %"
