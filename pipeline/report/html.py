"""The report as one HTML file: plots and style inside, nothing fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from edgepress.pipeline.registry import require
from edgepress.pipeline.report import text as report
from edgepress.pipeline.report.tables import (
    COMPARISON_HEADER,
    STAGE_HEADER,
    artifact_rows,
    comparison_rows,
    figure_rows,
    made_by,
    reports_of,
    stage_rows,
)
from edgepress.pipeline.report.verdict import verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")


def html(content: dict[str, Any]) -> str:
    """The whole page. Raises MissingPackageError without matplotlib."""
    require("matplotlib")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    reports = reports_of(content)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=report.title(reports),
        verdict=verdict(reports),
        artifacts=artifact_rows(reports),
        comparisons=[COMPARISON_HEADER, *rows] if (rows := comparison_rows(content)) else [],
        first=content["artifact"],
        plots=_plots(reports),
        influences=_influences(reports),
        reports=[
            {
                "name": r["artifact"],
                "made_by": made_by(r),
                "stages": [STAGE_HEADER, *stage_rows(r)],
                "figures": [["figure", "median", "range"], *figure_rows(r)],
                "missing": r["missing"],
            }
            for r in reports
        ],
        notes={key: lines[0] for key, lines in report.NOTES.items()},
        environments=report.environments(reports),
    )


def _plots(reports: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """Section -> (caption, svg) of each plot that has something to show."""
    from edgepress.pipeline.report import plots

    joined = "the line joins what nothing else beats at its"
    sizes = (f"Size against quality. Better is down and to the left; {joined} size.", plots.against_quality(reports, "size"))
    speeds = (f"Speed against quality. Better is down and to the right; {joined} speed.", plots.against_quality(reports, "speed"))
    boxes = [
        ("Peak resident memory of the processes that ran the model.", "memory.peak_rss_bytes", "peak memory (RSS), MB", 1e-6),
        ("Time between tokens while decoding.", "speed.inter_token_ms", "time between tokens, ms", 1.0),
    ]
    boxes += [(f"Time to the first token of {n}.", f"speed.ttft_ms.{n}", f"first token of {n}, ms", 1.0) for n in _lengths(reports)]
    found = {
        "frontier": [sizes, speeds],
        "losses": [("What each stage added to the loss, from the original to what ships.", plots.losses(reports))],
        "distributions": [(caption, plots.spread(reports, name, label, scale)) for caption, name, label, scale in boxes],
    }
    return {section: [pair for pair in pairs if pair[1]] for section, pairs in found.items()}


def _lengths(reports: list[dict[str, Any]]) -> list[int]:
    prefix = "speed.ttft_ms."
    return sorted({int(n.removeprefix(prefix)) for r in reports for n in r["figures"] if n.startswith(prefix)})


def _influences(reports: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(caption, svg) for each different removal."""
    from edgepress.pipeline.report import plots

    found: dict[tuple[int, ...], tuple[str, str]] = {}
    for r in reports:
        for step in r["steps"]:
            values, removed = step["facts"].get("influences"), step["facts"].get("removed_layers")
            if values and removed and tuple(removed) not in found:
                numbers = ", ".join(map(str, removed))
                found[tuple(removed)] = (f"{r['artifact']}: layers {numbers} removed.", plots.influences(values, removed))
    return list(found.values())
