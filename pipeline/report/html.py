"""The report as one HTML file: as text that files.py writes; plots and style inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from edgepress.pipeline.registry import require
from edgepress.pipeline.report import text
from edgepress.pipeline.report.decision import decision
from edgepress.pipeline.report.model import Report, ReportFile, for_people
from edgepress.pipeline.report.tables import (
    COMPARISON_HEADER,
    FIGURE_HEADER,
    STAGE_HEADER,
    artifact_rows,
    comparison_rows,
    figure_rows,
    made_by,
    originals,
    prompt_length,
    stage_rows,
)
from edgepress.pipeline.report.verdict import verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")


def html(content: ReportFile) -> str:
    """The whole page. Raises MissingPackageError without matplotlib."""
    require("matplotlib")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    content = for_people(content)
    reports = content.reports
    planned = text.forecast_rows(reports)
    plots, influences, compared = _plots(reports), _influences(reports), comparison_rows(content.comparisons)
    sections = {
        "frontier": ("Size, speed and quality", plots["frontier"]),
        "compared": (f"Compared with {content.first.artifact}", compared),
        "answers": ("Asked the same", text.answer_rows(reports)),
        "planned": ("What was planned", planned),
        "loss": ("Loss by stage", reports), "influence": ("Influence of each layer", influences),
        "latency": ("Memory and latency", plots["distributions"]), "shipped": ("As shipped", reports),
        "environment": ("Environment", reports),
    }  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=text.title(reports),
        decision=decision(reports),
        verdict=verdict(reports),
        sections=[(anchor, heading) for anchor, (heading, shown) in sections.items() if shown],
        artifacts=artifact_rows(reports),
        comparisons=[COMPARISON_HEADER, *compared] if compared else [],
        first=content.first.artifact,
        plots=plots,
        influences=influences,
        answers=text.answer_rows(reports),
        planned=planned,
        reports=[
            {
                "name": r.artifact,
                "made_by": made_by(r),
                "stages": [STAGE_HEADER, *stage_rows(r)],
                "figures": [FIGURE_HEADER, *figure_rows(r)],
                "missing": r.missing,
            }
            for r in reports
        ],
        originals=[(one.label, [FIGURE_HEADER, *figure_rows(one)]) for one in originals(reports)],
        notes=text.NOTES,
        environments=text.environments(reports),
    )


def _plots(reports: Sequence[Report]) -> dict[str, list[tuple[str, str]]]:
    """Section -> (caption, svg) of each plot that has something to show."""
    from edgepress.pipeline.report import plots

    joined = "a line joins the artifacts that are Pareto-optimal in"
    sizes = (f"Size against quality. Better is down and to the left; {joined} size.", plots.against_quality(reports, "size"))
    speeds = (
        f"Speed against quality. Better is down and to the right; {joined} speed. Bars: from the slowest round to the fastest, and "
        "a standard error of KL to either side.",
        plots.against_quality(reports, "speed"),
    )
    boxes = [
        ("Peak resident set size of the processes that ran the model.", "memory.peak_rss_bytes", "peak RSS, MB", 1e-6),
        ("Time between tokens while decoding.", "speed.inter_token_ms", "inter-token latency, ms", 1.0),
    ]
    boxes += [(f"Time to first token, prompt of {n}.", f"speed.ttft_ms.{n}", f"TTFT @{n}, ms", 1.0) for n in _lengths(reports)]
    sections = {
        "frontier": [sizes, speeds],
        "forecast": [
            (
                f"{r.artifact}: size against the growth of perplexity, as expected (line), chosen (ring) and measured (cross).",
                plots.forecast(r),
            )
            for r in reports
            if r.forecast
        ],
        "losses": [("What each stage added to the loss, from the original to the shipped files.", plots.losses(reports))],
        "distributions": [(caption, plots.spread(reports, name, label, scale)) for caption, name, label, scale in boxes],
    }
    return {section: [pair for pair in pairs if pair[1]] for section, pairs in sections.items()}


def _lengths(reports: Sequence[Report]) -> list[int]:
    return sorted({prompt_length(name) for r in reports for name in r.figures if name.startswith("speed.ttft_ms.")})


def _influences(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """(caption, svg) for each different removal."""
    from edgepress.pipeline.report import plots

    pairs = []
    for artifact, removal in text.removals(reports):
        numbers = ", ".join(map(str, removal.gone))
        pairs.append((f"{artifact}: {removal.what} {numbers} removed.", plots.influences(removal.influences, removal.gone)))
    return pairs
