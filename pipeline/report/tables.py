"""Rows of strings for people, from the content of report.json alone; Markdown, HTML and the terminal show the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from edgepress.pipeline.report.comparison import quantized_as, removed_layers
from edgepress.pipeline.report.stats import frontier

Rows = list[list[str]]
FIGURES = (
    ("size.total_bytes", "size of the folder"),
    ("size.bits_per_weight", "bits per weight"),
    ("load.cold_s", "load, files not in memory"),
    ("load.warm_s", "load, files in memory"),
    ("memory.peak_rss_bytes", "peak memory (RSS)"),
    ("memory.peak_pss_bytes", "peak memory (PSS)"),
    ("memory.gpu_bytes", "GPU memory"),
    ("speed.ttft_ms", "time to first token"),
    ("speed.prefill_tokens_per_s", "prefill"),
    ("speed.decode_tokens_per_s", "decode"),
    ("speed.inter_token_ms", "time between tokens"),
    ("speed.bandwidth_fraction", "share of the memory's bandwidth"),
    ("quality.perplexity", "perplexity"),
    ("quality.bits_per_byte", "bits per byte"),
    ("quality.kl_mean", "KL divergence from the original, mean"),
    ("quality.kl_p99", "KL divergence from the original, 99th percentile"),
    ("quality.top1_agreement", "same most likely token as the original"),
    ("quality.greedy_match_tokens", "greedy tokens in common with the original"),
)
STAGES = {"onnx_level_0": "ONNX, float activations", "onnx": "ONNX as shipped"}
STAGE_HEADER = ["stage", "weights", "perplexity", "change", "share of loss", "KL", "top-1"]
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


def reports_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every artifact's report in the content of a report.json, the first one first."""
    return [content, *content.get("beside", [])]


def shown(value: float, unit: str) -> str:
    """A number with its unit, three or four digits."""
    if unit.startswith("byte"):
        return (f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB") + unit.removeprefix("byte").replace(
            "second", "s"
        )
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text + _UNITS.get(unit, f" {unit}s" if unit == "token" else f" {unit}")


def figure_rows(report: dict[str, Any]) -> Rows:
    """[label, median, range of the samples] in the order of FIGURES; figures per prompt length one row each, tasks last."""
    rows = []
    for prefix, label in FIGURES:
        for name, figure in report["figures"].items():
            if name == prefix or re.fullmatch(re.escape(prefix) + r"\.\d+", name):
                length = name.removeprefix(prefix).lstrip(".")
                rows.append(
                    [f"{label}, prompt of {length}" if length else label, shown(figure["median"], figure["unit"]), _spread(figure)]
                )
    for name, figure in report["figures"].items():
        if name.startswith("tasks."):
            rows.append([name.removeprefix("tasks."), shown(figure["median"], figure["unit"]), _spread(figure)])
    return rows


def _spread(figure: dict[str, Any]) -> str:
    values, unit = figure["values"], figure["unit"]
    if "standard_error" in figure:
        return f"± {shown(figure['standard_error'], unit)}"
    if len(values) < 2:
        return ""
    if "p95" in figure:
        return f"95th percentile {shown(figure['p95'], unit)}, 99th {shown(figure['p99'], unit)}, {len(values)} samples"
    return f"{shown(min(values), unit)} to {shown(max(values), unit)}, {len(values)} samples"


def stage_rows(report: dict[str, Any]) -> Rows:
    """One row a stage, under STAGE_HEADER; the change is from the original, the share is of the whole loss."""
    rows: Rows = []
    first = report["stages"][0] if report["stages"] else {}
    for stage in report["stages"]:
        name = STAGES.get(stage["name"], stage["name"]) + (" (suspect)" if "suspect" in stage else "")
        if "failed" in stage:
            rows.append([name, shown(stage["bytes"], "byte"), "failed", "", "", "", ""])
            continue
        change = stage["perplexity"] / first["perplexity"] - 1 if "perplexity" in first else None
        rows.append(
            [
                name,
                shown(stage["bytes"], "byte"),
                f"{stage['perplexity']:.4g}",
                f"{100 * change:+.1f} %" if stage is not first and change is not None else "",
                f"{round(100 * stage['share'], 1) + 0.0:.1f} %" if "share" in stage else "",  # no -0.0
                f"{max(stage['kl_mean'], 0):.4f}" if "kl_mean" in stage else "",
                f"{100 * stage['top1_agreement']:.1f} %" if "top1_agreement" in stage else "",
            ]
        )
    return rows


def artifact_rows(reports: Sequence[dict[str, Any]]) -> Rows:
    """Header, the original, and a row for each artifact, numbered as in the plots; columns that nothing fills are left out."""
    prompt = max((n for r in reports for n in r["figures"] if n.startswith("speed.ttft_ms.")), key=_length, default="")
    columns = (
        ("size", "size.total_bytes"),
        ("bits/weight", "size.bits_per_weight"),
        ("perplexity", "quality.perplexity"),
        ("KL, nat", "quality.kl_mean"),
        ("top-1", "quality.top1_agreement"),
        ("decode, tokens/s", "speed.decode_tokens_per_s"),
        (f"first token of {_length(prompt)}", prompt),
        ("peak memory", "memory.peak_rss_bytes"),
    )
    best = {kind: set(best_of(reports, kind)) for kind in ("size", "speed")}
    rows = [["#", "artifact", "removed", "quantized", *(label for label, _ in columns), "best at its"]]
    original = next((r["stages"][0] for r in reports if r["stages"] and r["stages"][0]["name"] == "original"), None)
    if original and "failed" not in original:
        known = {"size.total_bytes": shown(original["bytes"], "byte"), "quality.perplexity": f"{original['perplexity']:.4g}"}
        rows.append(["", "original (weights)", "", "float", *(known.get(name, "") for _, name in columns), ""])
    for number, report in enumerate(reports):
        cells = [report["figures"].get(name) for _, name in columns]
        rows.append(
            [
                str(number + 1),
                report["artifact"] + (" (failed)" if report["failed"] else ""),
                str(len(removed_layers(report)) or ""),
                quantized(report),
                *("" if cell is None else _short(cell) for cell in cells),
                ", ".join(kind for kind in best if number in best[kind]),
            ]
        )
    filled = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in filled] for row in rows]


def _short(figure: dict[str, Any]) -> str:
    """For a column whose header says the unit."""
    unit = figure["unit"]
    return shown(figure["median"], unit if unit.startswith(("byte", "millisecond")) else "bit/byte")


def points(reports: Sequence[dict[str, Any]], kind: str) -> dict[int, tuple[float, float]]:
    """Report number -> (size in MB or decode tokens/s, KL or else perplexity), for those that have both."""
    quality = "quality.kl_mean" if all("quality.kl_mean" in r["figures"] for r in reports) else "quality.perplexity"
    name = {"size": "size.total_bytes", "speed": "speed.decode_tokens_per_s"}[kind]
    scale = {"size": 1e-6, "speed": 1.0}[kind]
    return {
        i: (scale * r["figures"][name]["median"], r["figures"][quality]["median"])
        for i, r in enumerate(reports)
        if {name, quality} <= set(r["figures"])
    }


def best_of(reports: Sequence[dict[str, Any]], kind: str) -> list[int]:
    """Numbers of the reports on the frontier of size (or speed) against quality, along it."""
    found = points(reports, kind)
    sign = 1 if kind == "size" else -1
    numbers = list(found)
    return [numbers[i] for i in frontier([(sign * found[n][0], found[n][1]) for n in numbers])]


def comparison_rows(content: dict[str, Any]) -> Rows:
    """One row a compared figure: every further artifact against the first."""
    names = dict(FIGURES)
    rows = []
    for c in content.get("comparisons", []):
        prefix, length = re.sub(r"\.\d+$", "", c["figure"]), re.search(r"\.(\d+)$", c["figure"])
        label = names[prefix] + (f", prompt of {length[1]}" if length else "")
        interval = f"{c['low']:.4g} to {c['high']:.4g}" if "low" in c else "one round"
        rows.append([c["artifact"], label, f"{c['ratio']:.4g}x", interval, c["verdict"]])
    return rows


def quantized(report: dict[str, Any]) -> str:
    """``gptq 4 bits/128`` or the method's name."""
    options = quantized_as(report)
    method = str(options.get("method", "float"))
    if method in ("rtn", "gptq"):
        return f"{method} {options['bits']} bits/{options['group_size']}"
    return "float" if method == "none" else method


CHOSEN = {
    "greedy": "chosen greedily by KL divergence among those of low Block Influence",
    "bi": "lowest Block Influence",
    "angular": "least angular distance",
    "list": "as told",
}


def made_by(report: dict[str, Any]) -> list[str]:
    """How the artifact came to be, a line a stage."""
    lines = []
    for step in report["steps"]:
        options, facts = step["options"], step["facts"]
        if step["stage"] == "prune":
            removed = ", ".join(map(str, facts["removed_layers"])) or "none"
            lines.append(f"prune: layers {removed} of {facts['layers'][0]} removed ({CHOSEN[facts.get('criterion', 'bi')]})")
            lines += [_healed(facts["healed"])] if "healed" in facts else []
        elif step["stage"] == "heal":
            lines.append(_healed(facts))
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
            exact = f" but for {len(facts['exact_layers'])} matrices at 0" if facts.get("exact_layers") else ""
            lines.append(f"export: {facts['exporter']} graph{because}, accuracy level {facts['accuracy_level']}{exact}")
        else:
            lines.append(step["stage"])
    return lines


def _length(figure: str) -> int:
    return int(figure.rpartition(".")[2] or 0)


def _healed(facts: dict[str, Any]) -> str:
    accepted = [method["method"] for method in facts["methods"] if method["accepted"]]
    if "why" in facts:
        return f"heal: left as it was, {facts['why']}"
    return f"heal: {' and '.join(accepted)}" if accepted else "heal: nothing that helped both kinds of text, left as it was"
