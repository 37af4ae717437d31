"""Rows of strings for people; Markdown, HTML and the terminal show the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgepress.pipeline.report.forecast import DECODE, MEMORY, SIZE
from edgepress.pipeline.report.model import Comparison, Figure, Original, Report, StageRow
from edgepress.pipeline.report.stats import WIDEST, frontier
from edgepress.pipeline.report.steps import describe

Rows = list[list[str]]
FIGURES = {
    SIZE: "size on disk",
    "size.bits_per_weight": "bits per weight",
    "load.cold_s": "cold load time",
    "load.warm_s": "warm load time",
    MEMORY: "peak RSS",
    "memory.peak_pss_bytes": "peak PSS",
    "memory.gpu_bytes": "GPU memory",
    "speed.ttft_ms": "TTFT",
    "speed.prefill_tokens_per_s": "prefill throughput",
    DECODE: "decode throughput",
    "speed.inter_token_ms": "inter-token latency",
    "speed.bandwidth_fraction": "memory bandwidth utilization",
    "quality.perplexity": "perplexity",
    "quality.bits_per_byte": "bits per byte",
    "quality.kl_mean": "KL divergence from the original, mean",
    "quality.kl_p99": "KL divergence from the original, 99th percentile",
    "quality.top1_agreement": "top-1 agreement with the original",
    "quality.greedy_match_tokens": "matching greedy tokens",
}
STAGE_LABELS = {"onnx_level_0": "ONNX, float activations", "onnx": "ONNX as shipped"}
STAGE_HEADER = ["stage", "weights", "perplexity", "change", "share of loss", "KL, nat", "top-1 agreement"]
FIGURE_HEADER = ["figure", "median", "range"]
COMPARISON_HEADER = ["artifact", "figure", "ratio", "99 % interval", "verdict"]
_UNITS = {
    "second": " s",
    "millisecond": " ms",
    "token/second": " tokens/s",
    "nat": " nat",
    "bit": " bit",
    "bit/byte": "",
    "1": "",
}


def shown(value: float, unit: str) -> str:
    """A number with its unit, three or four digits."""
    if unit.startswith("byte"):
        return (f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB") + unit.removeprefix("byte").replace(
            "second", "s"
        )
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text + _UNITS.get(unit, f" {unit}s" if unit == "token" else f" {unit}")


def figure_rows(report: Report | Original) -> Rows:
    """[label, median, range of the samples] in the order of FIGURES; figures per prompt length one row each, tasks last."""
    rows = []
    for prefix in FIGURES:
        for name, figure in report.figures.items():
            if name == prefix or re.fullmatch(re.escape(prefix) + r"\.\d+", name):
                rows.append([_label(name), shown(figure.median, figure.unit), _spread(figure)])
    for name, figure in report.figures.items():
        if name.startswith("tasks."):
            rows.append([name.removeprefix("tasks."), shown(figure.median, figure.unit), _spread(figure)])
    return rows


def originals(reports: Sequence[Report]) -> list[Original]:
    """What plain transformers ran, one of each run."""
    return list({report.run: report.original for report in reports if report.original}.values())


def _label(figure: str) -> str:
    """``TTFT @384`` of ``speed.ttft_ms.384``: the number is the prompt's length in tokens."""
    length = prompt_length(figure)
    prefix = figure.removesuffix(f".{length}") if length else figure
    return FIGURES.get(prefix, prefix) + (f" @{length}" if length else "")


def _spread(figure: Figure) -> str:
    if figure.standard_error is not None:
        return f"± {shown(figure.standard_error, figure.unit)}"
    count = len(figure.values)
    if count < 2:
        return ""
    if percentiles := figure.percentiles:
        p95, p99 = (shown(percentiles[q], figure.unit) for q in (95, 99))
        return f"95th percentile {p95}, 99th {p99}, {count} samples"
    return f"{shown(min(figure.values), figure.unit)} to {shown(max(figure.values), figure.unit)}, {count} samples"


def stage_rows(report: Report) -> Rows:
    """One row a stage, under STAGE_HEADER; the change is from the original, the share is of the whole loss."""
    return [_stage_cells(row, report.stages[0]) for row in report.stages]


def _stage_cells(row: StageRow, first: StageRow) -> list[str]:
    name = STAGE_LABELS.get(row.name, row.name) + (" (suspect)" if row.suspect else "")
    if row.failed is not None or row.perplexity is None:
        return [name, shown(row.bytes, "byte"), "failed", "", "", "", ""]
    change = None if row is first or first.perplexity is None else row.perplexity / first.perplexity - 1
    return [
        name,
        shown(row.bytes, "byte"),
        f"{row.perplexity:.4g}",
        "" if change is None else f"{100 * change:+.1f} %",
        "" if row.share is None else f"{round(100 * row.share, 1) + 0.0:.1f} %",  # no -0.0
        "" if row.kl_mean is None else f"{max(row.kl_mean, 0):.4f}",
        "" if row.top1_agreement is None else f"{100 * row.top1_agreement:.1f} %",
    ]


def artifact_rows(reports: Sequence[Report]) -> Rows:
    """Header, the original, and a row for each artifact, numbered as in the plots; empty columns are dropped."""
    prompt = max((n for r in reports for n in r.figures if n.startswith("speed.ttft_ms.")), key=prompt_length, default="")
    columns = {
        "size on disk": SIZE,
        "bits/weight": "size.bits_per_weight",
        "perplexity": "quality.perplexity",
        "KL, nat": "quality.kl_mean",
        "top-1 agreement": "quality.top1_agreement",
        "decode, tokens/s": DECODE,
        f"TTFT @{prompt_length(prompt)}": prompt,
        "peak RSS": MEMORY,
    }
    best = {kind: set(best_of(reports, kind)) for kind in ("size", "speed") if len(reports) > 1}  # one alone is always the best
    narrowed = any(report.channels_removed or report.parts_removed for report in reports)
    rows = [["#", "artifact", "removed" if narrowed else "layers removed", "quantization", *columns, "Pareto-optimal in"]]
    original = next((r for r in reports if r.stages and r.stages[0].name == "original" and r.stages[0].failed is None), None)
    if original:
        weights, run = original.stages[0], original.original
        known = {SIZE: shown(weights.bytes, "byte"), "quality.perplexity": f"{weights.perplexity:.4g}"}
        known |= {name: _short(figure) for name, figure in run.figures.items()} if run else {}
        label = run.label if run else "original (weights)"
        rows.append(["", label, "", "float", *(known.get(name, "") for name in columns.values()), ""])
    for number, report in enumerate(reports):
        cells = [report.figures.get(name) for name in columns.values()]
        rows.append(
            [
                str(number + 1),
                report.artifact + (" (failed)" if report.failed else ""),
                report.removed if narrowed else str(len(report.removed_layers) or ""),
                report.quantization.label,
                *("" if cell is None else _short(cell) for cell in cells),
                ", ".join(kind for kind in best if number in best[kind]),
            ]
        )
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


def _short(figure: Figure) -> str:
    """For a column whose header has the unit."""
    return shown(figure.median, figure.unit if figure.unit.startswith(("byte", "millisecond")) else "bit/byte")


def points(reports: Sequence[Report], kind: str) -> dict[int, tuple[Figure, Figure]]:
    """Report number -> (size or decode speed, KL or else perplexity), for those that have both."""
    quality = "quality.kl_mean" if all("quality.kl_mean" in r.figures for r in reports) else "quality.perplexity"
    name = {"size": SIZE, "speed": DECODE}[kind]
    return {i: (r.figures[name], r.figures[quality]) for i, r in enumerate(reports) if {name, quality} <= set(r.figures)}


def best_of(reports: Sequence[Report], kind: str) -> list[int]:
    """Numbers of the reports that are Pareto-optimal in size (or speed) against quality, along the frontier."""
    known = points(reports, kind)
    sign = 1 if kind == "size" else -1
    numbers = list(known)
    return [numbers[i] for i in frontier([(sign * known[n][0].median, known[n][1].median) for n in numbers])]


def comparison_rows(comparisons: Sequence[Comparison]) -> Rows:
    """One row a compared figure: every further artifact against the first."""
    return [[c.artifact, _label(c.figure), f"{c.ratio:.4g}x", _interval(c), c.verdict] for c in comparisons]


def _interval(comparison: Comparison) -> str:
    if comparison.low is None or comparison.high is None:
        return "one round"
    if comparison.high > WIDEST * comparison.low:
        return "too few rounds"
    return f"{comparison.low:.4g} to {comparison.high:.4g}"


def made_by(report: Report) -> list[str]:
    """How the artifact came to be, a line a stage, and on which text its quality was measured."""
    tokens = report.figures.get("quality.tokens")
    known = [f"quality: on {tokens.median:,.0f} tokens of {report.text}"] if tokens and report.text else []
    return [*(describe(step) for step in report.steps), *known]


def prompt_length(figure: str) -> int:
    """The tokens at the end of a figure's name, 0 where it has none."""
    last = figure.rpartition(".")[2]
    return int(last) if last.isdecimal() else 0
