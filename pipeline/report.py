"""Figures for people: the Markdown report and the terminal table, both from the content of report.json alone."""

from __future__ import annotations

from typing import Any

ROWS = (
    ("size.total_bytes", "size of the folder"),
    ("size.bits_per_weight", "bits per weight"),
    ("load.warm_s", "load"),
    ("memory.peak_rss_bytes", "peak memory (RSS)"),
    ("memory.pss_bytes", "memory (PSS, at the end)"),
    ("speed.ttft_ms", "time to first token"),
    ("speed.prefill_tokens_per_s", "prefill"),
    ("speed.decode_tokens_per_s", "decode"),
    ("quality.perplexity", "perplexity"),
    ("quality.bits_per_byte", "bits per byte"),
    ("quality.kl_mean", "KL divergence from the original, mean"),
    ("quality.kl_p99", "KL divergence from the original, 99th percentile"),
    ("quality.top1_agreement", "same most likely token as the original"),
)
STAGES = {"original": "original", "pruned": "pruned", "quantized": "quantized", "onnx": "ONNX as shipped"}


def shown(value: float, unit: str) -> str:
    """A number with its unit, three or four digits."""
    if unit == "byte":
        return f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    units = {
        "second": " s",
        "millisecond": " ms",
        "token/second": " tokens/s",
        "nat": " nat",
        "bit": " bit",
        "bit/byte": "",
        "1": "",
    }
    return text + units.get(unit, f" {unit}")


def figure_rows(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, median, range of the samples) in the order of ROWS; figures per prompt length one row each."""
    rows = []
    for prefix, label in ROWS:
        for name, figure in content["figures"].items():
            if name != prefix and not name.startswith(prefix + "."):
                continue
            length = name.removeprefix(prefix).lstrip(".")
            values = figure["values"]
            spread = f"{shown(min(values), figure['unit'])} to {shown(max(values), figure['unit'])}, {len(values)} samples"
            rows.append(
                (
                    f"{label}, prompt of {length}" if length else label,
                    shown(figure["median"], figure["unit"]),
                    spread if len(values) > 1 else "",
                )
            )
    return rows


def stage_rows(content: dict[str, Any]) -> list[list[str]]:
    """One row a stage: name, weights' bytes, perplexity and its change, KL, top-1."""
    stages = content["stages"]
    rows = []
    for stage in stages:
        change = stage["perplexity"] / stages[0]["perplexity"] - 1
        rows.append(
            [
                STAGES.get(stage["name"], stage["name"]),
                shown(stage["bytes"], "byte"),
                f"{stage['perplexity']:.4g}",
                f"{100 * change:+.1f} %" if stage is not stages[0] else "",
                f"{max(stage['kl_mean'], 0):.4f}" if "kl_mean" in stage else "",
                f"{100 * stage['top1_agreement']:.1f} %" if "top1_agreement" in stage else "",
            ]
        )
    return rows


CHOSEN = {
    "greedy": "chosen greedily by KL divergence among those of low Block Influence",
    "bi": "lowest Block Influence",
    "angular": "least angular distance",
    "list": "as told",
}
STAGE_HEADER = ["stage", "weights", "perplexity", "change", "KL", "top-1"]


def made_by(content: dict[str, Any]) -> list[str]:
    """How the artifact came to be, a line a stage."""
    lines = []
    for step in content["steps"]:
        options, facts = step["options"], step["facts"]
        if step["stage"] == "prune":
            removed = ", ".join(map(str, facts["removed_layers"])) or "none"
            lines.append(f"prune: layers {removed} of {facts['layers'][0]} removed ({CHOSEN[facts['criterion']]})")
        elif step["stage"] == "quantize":
            kind = options["method"]
            if kind in ("rtn", "gptq"):
                symmetry = "symmetric" if options["symmetric"] else "asymmetric"
                kind += f", {options['bits']} bits, groups of {options['group_size']}, {symmetry}"
            bits = facts.get("head", "float")
            head = "" if kind == "none" else "; head float" if bits == "float" else f"; head {next(iter(bits.values()))} bits"
            lines.append(f"quantize: {kind}{head}")
        elif step["stage"] == "export":
            because = f" ({facts['not_fused_because']})" if "not_fused_because" in facts else ""
            lines.append(f"export: {facts['exporter']} graph{because}, accuracy level {facts['accuracy_level']}")
    return lines


def table(rows: list[list[str]]) -> str:
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
    stability = content["rank_correlation_of_halves"]
    sure = f"\n\nrank correlation of the influences from two halves of the text: {stability:.2f}" if stability is not None else ""
    return table(rows) + sure


def terminal(content: dict[str, Any]) -> str:
    """Both tables as text."""
    figures = [
        ["", "median", "range"],
        *([*row] for row in figure_rows(content) if not row[0].startswith("KL divergence from the original, 99")),
    ]
    return f"{table([STAGE_HEADER, *stage_rows(content)])}\n\n{table(figures)}"


def markdown(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    environment = content["environment"]
    lines = [f"# Report on {content['artifact']}", "", *(f"- {line}" for line in made_by(content)), ""]
    lines += ["## Quality by stage", "", *_markdown_table([STAGE_HEADER, *stage_rows(content)]), ""]
    tokens = content["stages"][-1]["tokens"]
    lines += [f"All rows read the same {tokens:,} tokens. KL (nats a token) and top-1 agreement are against the original.", ""]
    lines += ["## As shipped", "", *_markdown_table([["figure", "median", "range"], *([*row] for row in figure_rows(content))]), ""]
    if content["missing"]:
        lines += ["Not measured:", "", *(f"- {name}: {reason}" for name, reason in content["missing"].items()), ""]
    cpu = environment["cpu"]
    lines += [
        "## Environment",
        "",
        f"- {cpu['model']}, {environment['cores']} cores, threads: {environment['threads']}, {environment['provider']}",
        f"- {', '.join(cpu.get('flags', []))}",
        f"- {environment['system']}, Python {environment['python']}",
        f"- {', '.join(f'{name} {v}' for name, v in environment['versions'].items())}",
        f"- {environment['date']}",
        "",
        f"    {environment['command']}",
        "",
    ]
    return "\n".join(lines)


def _markdown_table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
