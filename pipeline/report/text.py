"""The report as text: Markdown and the terminal. HTML: html.py."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgepress.pipeline.report import forecast
from edgepress.pipeline.report.decision import decision
from edgepress.pipeline.report.model import Environment, Parting, Report, ReportFile, for_people
from edgepress.pipeline.report.steps import Removal
from edgepress.pipeline.report.tables import (
    COMPARISON_HEADER,
    FIGURE_HEADER,
    STAGE_HEADER,
    Rows,
    artifact_rows,
    comparison_rows,
    figure_rows,
    made_by,
    originals,
    stage_rows,
)
from edgepress.pipeline.report.verdict import verdict


def terminal(content: ReportFile) -> str:
    """Verdict and tables as text."""
    content = for_people(content)
    reports, first = content.reports, content.first
    parts = [decision(reports)]
    parts += ["\n".join(verdict(reports))] if len(reports) > 1 else []
    parts += [table(artifact_rows(reports))] if len(reports) > 1 or first.original else []
    parts.append("\n".join(f"{who}: {said}" for who, said in answer_rows(reports)))
    parts += [f"what was planned of {artifact}:\n" + table(rows) for artifact, rows in forecast_rows(reports)]
    parts.append(table([STAGE_HEADER, *stage_rows(first)]))
    if rows := comparison_rows(content.comparisons):
        parts.append(f"compared with {first.artifact}:\n" + table([COMPARISON_HEADER, *rows]))
    figures = [row for row in figure_rows(first) if not row[0].endswith("99th percentile")]
    parts.append(table([["", *FIGURE_HEADER[1:]], *figures]))
    return "\n\n".join(part for part in parts if part)


def table(rows: Rows) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def title(reports: Sequence[Report]) -> str:
    """The names of the first few artifacts."""
    names = ", ".join(r.artifact for r in reports[:3])
    return names + (f" and {len(reports) - 3} more" if len(reports) > 3 else "")


def markdown(content: ReportFile) -> str:
    """The report as Markdown."""
    content = for_people(content)
    reports = content.reports
    shipped = decision(reports)
    lines = [f"# Report on {escaped(title(reports))}", "", *([f"**{escaped(shipped)}**", ""] if shipped else [])]
    lines += [*(f"- {escaped(line)}" for line in verdict(reports)), ""]
    lines += [*_markdown_table(artifact_rows(reports)), "", NOTES["artifacts"], ""]
    lines += [NOTES["original"], ""] if originals(reports) else []
    if rows := comparison_rows(content.comparisons):
        lines += [f"## Compared with {escaped(content.first.artifact)}", "", *_markdown_table([COMPARISON_HEADER, *rows]), ""]
        lines += [NOTES["comparisons"], ""]
    if answers := answer_rows(reports):
        lines += ["## Asked the same", "", *(f"- {escaped(who)}: {escaped(said)}" for who, said in answers), ""]
    for artifact, planned in forecast_rows(reports):
        lines += [f"## What was planned of {escaped(artifact)}", "", *_markdown_table(planned), "", NOTES["forecast"], ""]
    lines += ["## Loss by stage", ""]
    for report in reports:
        lines += [f"### {escaped(report.artifact)}", "", *(f"- {escaped(line)}" for line in made_by(report)), ""]
        lines += [*_markdown_table([STAGE_HEADER, *stage_rows(report)]), ""]
    lines += [NOTES["stages"], ""]
    if influences := influence_lines(reports):
        lines += ["## Influence of each layer", "", *(f"- {line}" for line in influences), ""]
    lines += ["## As shipped", ""]
    shown = [(original.label, figure_rows(original)) for original in originals(reports)]
    for name, rows in [*shown, *((report.artifact, figure_rows(report)) for report in reports)]:
        lines += [f"### {escaped(name)}", "", *_markdown_table([FIGURE_HEADER, *rows]), ""]
    for report in reports:
        if report.missing:
            missing = (f"- {escaped(f'{name}: {why}')}" for name, why in report.missing.items())
            lines += [f"Not measured of {escaped(report.artifact)}:", "", *missing, ""]
    for command, facts in environments(reports):
        lines += ["## Environment", "", *(f"- {escaped(fact)}" for fact in facts), "", "To reproduce:", "", f"    {command}", ""]
    return "\n".join(lines)


NOTES = {
    "artifacts": "Size on disk: all files of the folder; of the original, its weights alone. Bits/weight: graph and weights over "
    "the model's parameters, scales, embedding and head counted. Pareto-optimal in size (or speed): nothing else here is as small "
    "(or as fast) and loses less. TTFT @N: time to first token of a prompt of N tokens.",
    "original": "Original (torch): run by plain transformers in its own type or float32, whichever decodes faster, on the same "
    "prompts; its memory has torch in it, as an artifact's has onnxruntime.",
    "comparisons": "Ratios of samples from fresh processes in interleaved rounds, paired by round; a verdict is given only where "
    "the whole interval lies on one side of 1.",
    "forecast": "Expected on this machine, or on the one that is named, before anything was made: the artifacts of least loss of "
    "several sizes, and the one that keeps to the bounds. Perplexity: its growth from the original.",
    "stages": "All rows read the same tokens. Weights: bytes of the tensors, each in the type that it is stored in; a quantized "
    "checkpoint has scales of four bytes, and some codes in more bits than the shipped files. Change: perplexity against the "
    "original. KL (nats per token) and top-1 agreement are against the original. Share of loss: of the whole rise of the loss, in "
    "nats per token, from the original to the shipped files.",
}


def removals(reports: Sequence[Report]) -> list[tuple[str, Removal]]:
    """(artifact, removal) for each different set of removed layers whose influences were measured."""
    different: dict[tuple[str, tuple[int, ...]], tuple[str, Removal]] = {}
    for report in reports:
        for step in report.steps:
            if step.removal and step.removal.influences and step.removal.gone:
                different.setdefault((step.removal.parts, step.removal.gone), (report.artifact, step.removal))
    return list(different.values())


def influence_lines(reports: Sequence[Report]) -> list[str]:
    """Block Influence of every layer as text, the removed ones marked; a line for each different removal."""
    lines = []
    for artifact, removal in removals(reports):
        cells = (
            f"**{i}: {value:.3g} (removed)**" if i in removal.gone else f"{i}: {value:.3g}"
            for i, value in enumerate(removal.influences)
        )
        lines.append(f"{escaped(artifact)}: {', '.join(cells)}")
    return lines


def forecast_rows(reports: Sequence[Report]) -> list[tuple[str, Rows]]:
    """(artifact, what was expected of it and of others, and what was measured) of those that a build planned."""
    tables = []
    for report in reports:
        if report.forecast:
            medians = {name: figure.median for name, figure in report.figures.items()}
            body = forecast.rows(report.forecast, medians, report.growth)
            name = f"{report.artifact} for {machine}" if (machine := report.forecast.machine) else report.artifact
            tables.append((name, [forecast.header(report.forecast), *body]))
    return tables


def answer_rows(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """(who, what is said): for each different question the question, the original's answer and those of the artifacts."""
    questions: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for report in reports:
        for one in report.answers:
            said = one.artifact if one.parting is None else f"{one.artifact} ({_parting(one.parting)})"
            questions.setdefault((one.asked, one.original), []).append((report.artifact, said))
    return [row for (asked, original), said in questions.items() for row in (("asked", asked), ("original", original), *said)]


def _parting(one: Parting) -> str:
    """Whether a near tie or a plain mistake led an answer elsewhere."""
    other = f"{100 * one.artifact_chance:.0f} %" if one.artifact_chance >= 0.01 else "less than 1 %"
    own = f'"{one.original}" {100 * one.original_chance:.0f} %'
    return f'it parts from the original where that gives {own} and "{one.artifact}" {other}'


def environments(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    """(command, facts) of each run that the reports come from."""
    by_run = {report.run: report.environment for report in reports}
    used = sorted({step.export.accuracy_level for report in reports for step in report.steps if step.export})
    accuracy = [f"accuracy level {', '.join(map(str, used))}"] if used else []
    return [(e.command, [*_facts(e), *accuracy]) for e in by_run.values()]


def _facts(e: Environment) -> list[str]:
    load = "" if e.load_average is None else f", load average {e.load_average} before"
    return [
        f"{e.cpu.model}, {e.cores} cores, threads: {e.threads}, {e.provider}",
        f"flags: {', '.join(e.cpu.flags or ()) or 'unknown'}",
        f"{e.system}, Python {e.python}",
        ", ".join(f"{name} {version}" for name, version in e.versions.items()),
        e.date + load,
        *(e.gpus or ()),
    ]


def escaped(text: str) -> str:
    """A text in Markdown that is not markup: no HTML, no link, no code, no further cell."""
    return re.sub(r"[\\`|\[\]<>]", r"\\\g<0>", text)


def _markdown_table(rows: Rows) -> list[str]:
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (list(map(escaped, head)), rule, *(map(escaped, row) for row in body))]
