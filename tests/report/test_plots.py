"""What a plot draws, from made-up figures: errors, axes that do not magnify noise, and a legend of what is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from edgepress.pipeline.report import plots
from edgepress.pipeline.report.model import Figure, Report
from made_up import PRUNED, WHOLE, a_report
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawing]:
    """The figures that were drawn instead of their SVG."""
    figures: list[Drawing] = []
    monkeypatch.setattr(plots, "_svg", lambda figure, title: figures.append(figure) or title)
    return figures


def with_kl(report: Report, mean: float, error: float | None = None) -> Report:
    return replace(report, figures=report.figures | {"quality.kl_mean": Figure.of("nat", [mean], error)})


def legend(figure: Drawing) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(axes: Axes) -> list[np.ndarray]:
    """The ends of every error bar, (2, 2)."""
    return [segment for box in axes.containers for lines in box.lines[2] for segment in lines.get_segments()]


def test_bars_show_the_rounds_and_the_standard_error(drawn: list[Drawing]) -> None:
    """Of the speed from the slowest round to the fastest; of the size nothing, for it has no error."""
    reports = [with_kl(PRUNED, 0.06, 0.002), WHOLE]
    plots.against_quality(reports, "speed")
    rates = PRUNED.figures["speed.decode_tokens_per_s"].values
    speed, error, other = bars(drawn[0].axes[0])
    assert speed[:, 0] == pytest.approx([min(rates), max(rates)]) and error[:, 1] == pytest.approx([0.058, 0.062])
    assert other[:, 1] == pytest.approx([0.01, 0.01])  # without a standard error there is none to show
    plots.against_quality(reports, "size")
    assert np.ptp(bars(drawn[1].axes[0])[0][:, 0]) == 0


def test_noise_lies_together(drawn: list[Drawing]) -> None:
    """Axes from 0; what is of no account is a small part of them."""
    alike = a_report("alike", removed=[], size=8.01e6, kl=0.01, decode=101)
    reports = [with_kl(WHOLE, 1e-6), with_kl(alike, 3e-6)]
    for kind in ("size", "speed"):
        plots.against_quality(reports, kind)
        axes = drawn[-1].axes[0]
        assert axes.get_xlim()[0] == 0 and axes.get_ylim()[0] <= 0 and axes.get_ylim()[1] >= 0.01
    without = [
        replace(r, figures={k: v for k, v in r.figures.items() if "kl" not in k} | {"quality.perplexity": Figure.of("1", [p])})
        for r, p in ((WHOLE, 20.0), (alike, 20.1))
    ]
    plots.against_quality(without, "size")
    low, high = drawn[-1].axes[0].get_ylim()
    assert low < 20 < 20.1 < high and 0.1 / (high - low) < 0.06
    plots.spread(reports, "memory.peak_rss_bytes", "peak RSS, MB", 1e-6)
    low, high = drawn[-1].axes[0].get_xlim()
    assert low == 0 and high == pytest.approx(1.05 * 101)  # few samples: all of them lie within the whiskers
    little = [replace(r, stages=(r.stages[0], replace(r.stages[1], change_nats=1e-6))) for r in reports]
    plots.losses(little)
    assert np.ptp(drawn[-1].axes[0].get_xlim()) >= 0.01


def test_a_legend_names_what_is_drawn_alone(drawn: list[Drawing]) -> None:
    """No method of an artifact without a point, no frontier of one point, no stage whose bar nobody sees."""
    failed = a_report("failed", removed=[1], size=6e6, kl=0.1, decode=200, bits=2)
    failed = replace(failed, figures={k: v for k, v in failed.figures.items() if k != "speed.decode_tokens_per_s"})
    worse = a_report("worse", removed=[], size=9e6, kl=0.02, decode=90)
    plots.against_quality([WHOLE, worse, failed], "speed")
    assert legend(drawn[0]) == ["gptq 4 bits/64"]
    plots.against_quality([WHOLE, PRUNED], "speed")
    assert legend(drawn[1]) == ["gptq 4 bits/64", "no layer removed", "1 layer removed", "Pareto frontier"]
    row = replace(WHOLE.stages[1], name="onnx_level_0", change_nats=1e-9)
    plots.losses([replace(WHOLE, stages=(WHOLE.stages[0], row, WHOLE.stages[1]))])
    assert legend(drawn[2]) == ["ONNX as shipped"]
    assert not plots.losses([replace(WHOLE, stages=(WHOLE.stages[0], replace(row, change_nats=0.0)))])
    for removed, names in (([], ["kept"]), ([0], ["removed", "kept"]), ([0, 1], ["removed"])):
        assert legend(plots.influence_figure([0.5, 0.1], removed)) == names
