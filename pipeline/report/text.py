"""The report as text: Markdown and the terminal, both from the content of report.json alone (HTML: report_html)."""

from __future__ import annotations

from typing import Any

from edgepress.pipeline.report.tables import (
    COMPARISON_HEADER,
    STAGE_HEADER,
    Rows,
    artifact_rows,
    comparison_rows,
    figure_rows,
    made_by,
    reports_of,
    stage_rows,
)
from edgepress.pipeline.report.verdict import verdict


def terminal(content: dict[str, Any]) -> str:
    """Verdict and tables as text."""
    reports = reports_of(content)
    parts = ["\n".join(verdict(reports)), table(artifact_rows(reports))] if len(reports) > 1 else []
    parts.append(table([STAGE_HEADER, *stage_rows(content)]))
    if rows := comparison_rows(content):
        parts.append(f"against {content['artifact']}:\n" + table([COMPARISON_HEADER, *rows]))
    figures = [row for row in figure_rows(content) if not row[0].endswith("99th percentile")]
    parts.append(table([["", "median", "range"], *figures]))
    return "\n\n".join(part for part in parts if part)


def table(rows: Rows) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def influence_table(content: dict[str, Any]) -> str:
    """A line a layer, from the content of influence.json."""
    first: dict[str, float] = content["rounds"][0].get("kl", {}) if content["rounds"] else {}
    rows = [["layer", "influence", *(["KL when it alone goes"] if first else []), ""]]
    for row in content["layers"]:
        measured = [f"{first[str(row['layer'])]:.4f}" if str(row["layer"]) in first else ""] if first else []
        rows.append([str(row["layer"]), f"{row['influence']:.4f}", *measured, "removed" if row["removed"] else ""])
    stability = content.get("rank_correlation_of_halves")
    sure = f"\n\nrank correlation of the influences from two halves of the text: {stability:.2f}" if stability is not None else ""
    return table(rows) + sure


def title(reports: list[dict[str, Any]]) -> str:
    """The names of the first few artifacts."""
    names = ", ".join(r["artifact"] for r in reports[:3])
    return names + (f" and {len(reports) - 3} more" if len(reports) > 3 else "")


def markdown(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    reports = reports_of(content)
    lines = [f"# Report on {title(reports)}", ""]
    lines += [
        *(f"- {line}" for line in verdict(reports)),
        "",
        *_markdown_table(artifact_rows(reports)),
        "",
        *NOTES["artifacts"],
        "",
    ]
    if rows := comparison_rows(content):
        lines += [
            f"## In turn with {content['artifact']}",
            "",
            *_markdown_table([COMPARISON_HEADER, *rows]),
            "",
            *NOTES["turns"],
            "",
        ]
    lines += ["## Loss by stage", ""]
    for report in reports:
        lines += [f"### {report['artifact']}", "", *(f"- {line}" for line in made_by(report)), ""]
        lines += [*_markdown_table([STAGE_HEADER, *stage_rows(report)]), ""]
    lines += [*NOTES["stages"], ""]
    if influences := influence_lines(reports):
        lines += ["## Influence of each layer", "", *(f"- {line}" for line in influences), ""]
    lines += ["## As shipped", ""]
    for report in reports:
        lines += [f"### {report['artifact']}", "", *_markdown_table([["figure", "median", "range"], *figure_rows(report)]), ""]
    for report in reports:
        if report["missing"]:
            lines += [f"Not measured of {report['artifact']}:", "", *(f"- {n}: {why}" for n, why in report["missing"].items()), ""]
    for command, facts in environments(reports):
        lines += ["## Environment", "", *(f"- {fact}" for fact in facts), "", "To get it again:", "", f"    {command}", ""]
    return "\n".join(lines)


NOTES = {
    "artifacts": ["Best at its size (or speed): nothing else here is as small (or as fast) and loses less."],
    "turns": [
        "Ratios of samples taken in turn, in fresh processes, paired by round; a verdict is given only where the whole interval "
        "lies on one side of 1."
    ],
    "stages": [
        "All rows read the same tokens. Change: perplexity against the original. KL (nats a token) and top-1 agreement are against "
        "the original. Share of loss: of the whole rise of the loss, in nats a token, from the original to what ships."
    ],
}


def influence_lines(reports: list[dict[str, Any]]) -> list[str]:
    """Block Influence of every layer as text, the removed ones marked; a line for each different removal."""
    lines: dict[tuple[int, ...], str] = {}
    for report in reports:
        for step in report["steps"]:
            influences, removed = step["facts"].get("influences"), step["facts"].get("removed_layers")
            if influences and removed:
                cells = (
                    f"**{i}: {value:.3g} (removed)**" if i in removed else f"{i}: {value:.3g}" for i, value in enumerate(influences)
                )
                lines.setdefault(tuple(removed), f"{report['artifact']}: {', '.join(cells)}")
    return list(lines.values())


def environments(reports: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(command, facts) of each run that the reports come from."""
    found = {}
    for report in reports:
        e = report["environment"]
        cpu = e["cpu"]
        facts = [
            f"{cpu['model']}, {e['cores']} cores, threads: {e['threads']}, {e['provider']}",
            f"flags: {', '.join(cpu.get('flags', [])) or 'not told'}",
            f"{e['system']}, Python {e['python']}",
            ", ".join(f"{name} {v}" for name, v in e["versions"].items()),
            e["date"] + (f", load average {e['load_average']} before" if "load_average" in e else ""),
            *e.get("gpus", []),
        ]
        level = {s["facts"]["accuracy_level"] for r in reports for s in r["steps"] if "accuracy_level" in s["facts"]}
        facts += [f"accuracy level {', '.join(map(str, sorted(level)))}"] if level else []
        found[report["run"]] = (e["command"], facts)
    return list(found.values())


def _markdown_table(rows: Rows) -> list[str]:
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
