"""The report's plots as SVG text that stands inside a page: no file, no script, no network."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from edgepress.pipeline.report.model import MANY, Report
from edgepress.pipeline.report.tables import STAGE_LABELS, best_of, points
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 5.2  # inches: letters are still read on a phone, to whose width the page brings a plot
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe and Ito, safe for colour blindness
_MARKERS = "osD^vP*X"
# What an axis shows at least: nats a token, and a share of the perplexity. Less between two artifacts is of no account.
_LEAST_NATS, _LEAST_SHARE = 0.01, 0.1
_THIN = 0.005  # of the longest bar: nobody sees a bar so thin
_BEYOND = 1.05  # what an axis shows behind the last value
_REMOVED, _KEPT = _COLOURS[1], "#9aa7b3"
_STYLE: dict[Any, Any] = {  # matplotlib types the keys of its settings one by one
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def against_quality(reports: Sequence[Report], kind: str) -> str:
    """Size or speed against quality, a numbered point an artifact, the Pareto frontier as a line; "" without two points.

    Bars: from the slowest round to the fastest, and a standard error of KL to either side.
    """
    known = points(reports, kind)
    if len(known) < 2:
        return ""
    figure, axes = _figure(3.6)
    drawn = [reports[number] for number in known]
    methods = list(dict.fromkeys(r.quantization.series for r in drawn))
    amounts = sorted({(len(r.removed_layers), sum(r.parts_removed.values()), r.channels_removed, r.removed) for r in drawn})
    removals = [removed for *_, removed in amounts]
    scale = 1e-6 if kind == "size" else 1.0
    for number, (cost, quality) in known.items():
        report, x, y = reports[number], scale * cost.median, quality.median
        rounds = [[x - scale * min(cost.values)], [scale * max(cost.values) - x]]
        colour = _COLOURS[methods.index(report.quantization.series) % len(_COLOURS)]
        marker = _MARKERS[removals.index(report.removed) % len(_MARKERS)]
        axes.errorbar(x, y, quality.standard_error, rounds, marker, color=colour, markersize=8, elinewidth=1)
        axes.annotate(str(number + 1), (x, y), xytext=(6, 5), textcoords="offset points")
    best = [(scale * known[number][0].median, known[number][1].median) for number in best_of(reports, kind)]
    axes.set_xlabel("size on disk, MB" if kind == "size" else "decode, tokens/s")
    axes.margins(0.1)
    axes.set_xlim(0, _BEYOND * axes.dataLim.x1)
    low, high = axes.get_ylim()
    if all("quality.kl_mean" in r.figures for r in reports):
        axes.set_ylabel("KL from the original, nat")
        high = max(high, _LEAST_NATS)
        axes.set_ylim(-0.04 * high, high)  # room below for the marker of one that loses nothing
    else:
        axes.set_ylabel("perplexity")
        more = max(0.0, _LEAST_SHARE * high - (high - low)) / 2
        axes.set_ylim(low - more, high + more)
    handles = [axes.plot([], [], "o", color=_COLOURS[i % len(_COLOURS)], label=_literal(m))[0] for i, m in enumerate(methods)]
    handles += [
        axes.plot([], [], _MARKERS[i % len(_MARKERS)], color="#444444", label=_literal(f"{removed or 'no layer'} removed"))[0]
        for i, removed in enumerate(removals)
        if len(removals) > 1 or removed
    ]
    if len(best) > 1:
        handles += axes.plot(*zip(*best, strict=True), "-", color="#444444", linewidth=1, zorder=0, label="Pareto frontier")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _svg(figure, f"{kind} against quality")


def forecast(report: Report) -> str:
    """Sizes that were planned against the growth of perplexity that was expected, and what was made; "" without a plan."""
    if report.forecast is None:
        return ""
    figure, axes = _figure(2.6)
    shown = [(point.size / 1e6, 100 * point.growth) for point in report.forecast.points]
    axes.plot([x for x, _ in shown], [y for _, y in shown], ".-", color=_COLOURS[0], linewidth=1)
    if asked := report.forecast.asked:
        axes.plot(asked.size / 1e6, 100 * asked.growth, "o", markersize=10, markerfacecolor="none", color=_COLOURS[1])
    if report.growth is not None:
        axes.plot(report.figures["size.total_bytes"].median / 1e6, 100 * report.growth, "x", markersize=8, color=_COLOURS[2])
    axes.set_xlabel("size on disk, MB")
    axes.set_ylabel("growth of perplexity, %")
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), max(high, 100 * _LEAST_NATS))
    return _svg(figure, "what was planned")


def influences(values: Sequence[float], removed: Sequence[int]) -> str:
    """The picture of ``influence_figure``."""
    return _svg(influence_figure(values, removed), "influence of each layer")


def influence_figure(values: Sequence[float], removed: Sequence[int]) -> Figure:
    """Influence of every layer, or of a part of each, the removed ones in another colour."""
    figure, axes = _figure(2.4)
    colours = [_REMOVED if i in removed else _KEPT for i in range(len(values))]
    axes.bar(range(len(values)), values, color=colours)
    if max(values) > 20 * sorted(values)[len(values) // 2] > 0:
        axes.set_yscale("log")
    axes.set_xticks(range(0, len(values), max(1, len(values) // 16)))
    axes.set_xlabel("layer")
    axes.set_ylabel("influence")
    for label, colour in (("removed", _REMOVED), ("kept", _KEPT)):
        if colour in colours:
            axes.bar([0], [0], color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def losses(reports: Sequence[Report]) -> str:
    """What each stage added to the loss, nats a token, stacked; "" where no stages were measured."""
    reports = [r for r in reports if any(row.change_nats for row in r.stages)]
    if not reports:
        return ""
    longest = sorted(reports, key=lambda r: -len(r.stages))  # it has the stages in their order
    most = max(abs(row.change_nats or 0.0) for r in reports for row in r.stages)
    seen = (row.name for r in longest for row in r.stages if abs(row.change_nats or 0.0) > _THIN * most)
    names = list(dict.fromkeys(seen))
    figure, axes = _figure(0.9 + 0.32 * len(reports))
    for index, name in enumerate(names):
        for position, report in enumerate(reports):
            rows = {row.name: row.change_nats or 0.0 for row in report.stages}
            value = rows.get(name, 0.0)
            # those of the same sign stand one behind the other
            start = sum(v for n in names[:index] if (v := rows.get(n, 0.0)) * value > 0)
            label = None if position else _literal(STAGE_LABELS.get(name, name))  # once in the legend
            axes.barh(position, value, left=start, color=_COLOURS[index % len(_COLOURS)], label=label)
    _artifacts(axes, reports)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xlabel("loss added, nats per token")
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, low + _LEAST_NATS))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _svg(figure, "loss by stage")


def spread(reports: Sequence[Report], figure_name: str, label: str, scale: float = 1.0) -> str:
    """Samples of a figure, a box an artifact: median, quartiles, whiskers over all of few samples, else from percentile 1 to 99.

    "" where none has it.
    """
    reports = [r for r in reports if figure_name in r.figures]
    if not reports:
        return ""
    figure, axes = _figure(0.8 + 0.32 * len(reports))
    samples = [[scale * v for v in r.figures[figure_name].values] for r in reports]
    ends = (1, 99) if max(map(len, samples)) >= MANY else (0, 100)
    axes.boxplot(
        samples, orientation="horizontal", positions=range(len(reports)), whis=ends, widths=0.6, showfliers=False,
        medianprops={"color": _COLOURS[1], "linewidth": 2},
    )  # fmt: skip
    _artifacts(axes, reports)
    axes.set_xlim(0, _BEYOND * axes.dataLim.x1)
    axes.set_xlabel(label)
    return _svg(figure, label)


def _literal(name: str) -> str:
    """A name that matplotlib does not read as a formula."""
    return name.replace("$", r"\$")


def _artifacts(axes: Axes, reports: Sequence[Report]) -> None:
    axes.set_yticks(range(len(reports)), [_literal(r.artifact[-28:]) for r in reports])
    axes.invert_yaxis()


def _figure(height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """An svg element that fills its container; the same content gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|legend|[xy]tick|LineCollection|PathCollection)_\d+"', "", text
    )
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
