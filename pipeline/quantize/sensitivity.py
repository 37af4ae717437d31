"""What each group of matrices costs when it alone is quantized: where to spend more bits (KL divergence on calibration text)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from edgepress.pipeline.checkpoint.blocks import block_linears, decoder_blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SensitivityOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.text.windows import text_windows
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")


def measure(folder: Path, options: SensitivityOptions) -> dict[str, Any]:
    """One row for each sublayer (attention, mlp) of each block, and a proposal of ``bits_for`` rules.

    Row: ``group``; ``pattern``, which matches its matrices; ``weights``, how many; ``kl``, mean KL(original || model with this
    group alone rounded to nearest) in nats a token; ``top1``, agreement; ``bytes``, what ``better_bits`` would add.
    The proposal takes groups by KL per added byte until ``extra`` is spent. KL of single groups does not add up exactly:
    the proposal is a good guess, to be measured like any recipe.
    """
    windows = text_windows(
        options.calibration, folder, budget=options.calibration_tokens, skip=options.calibration_skip, shortest=16
    )
    model = load_model(folder, options.trust_remote_code)
    whole = [logits_of(model, ids) for ids in windows]
    rows, groups = [], _groups(model)
    log.info("sensitivity: %d groups, each rounded alone and read over %d tokens", len(groups), sum(map(len, windows)))
    for name, modules in progress(groups.items(), "sensitivity", "group"):
        with _rounded(modules, options):
            scores = Quality()
            for ids, truth in zip(windows, whole, strict=True):
                scores.add(ids, logits_of(model, ids), truth)
        figures, weights = scores.figures(), sum(m.weight.numel() for m in modules.values())
        rows.append({
            "group": name,
            "pattern": re.escape(name).replace("\\.", ".") + ".*",
            "weights": weights,
            "kl": figures["kl_mean"],
            "top1": figures["top1_agreement"],
            "bytes": weights * (options.better_bits - options.bits) // 8,
        })  # fmt: skip
    return {"bits": options.bits, "group_size": options.group_size, "rows": rows, "bits_for": propose(rows, options)}


def propose(rows: list[dict[str, Any]], options: SensitivityOptions) -> list[str]:
    """``bits_for`` rules for the groups that gain most for a byte, within ``extra`` of the bytes at ``bits``."""
    left = options.extra * sum(row["weights"] for row in rows) * options.bits / 8
    chosen = []
    for row in sorted(rows, key=lambda row: -row["kl"] / max(row["bytes"], 1)):
        if row["bytes"] <= left:
            left -= row["bytes"]
            chosen.append(f"{row['pattern']}={options.better_bits}")
    return chosen


def table(found: dict[str, Any]) -> str:
    """The rows as text, most sensitive first, and the proposal as flags."""
    lines = [f"{'group':<40} {'KL, nat':>9} {'top-1':>8} {'weights':>12}"]
    for row in sorted(found["rows"], key=lambda row: -row["kl"]):
        lines.append(f"{row['group']:<40} {row['kl']:>9.5f} {100 * row['top1']:>6.1f} % {row['weights']:>12,}")
    if found["bits_for"]:
        lines += ["", "more bits for the first of these:", " ".join(f"--bits-for '{rule}'" for rule in found["bits_for"])]
        lines += ["", "or in a recipe:", "quantize:", "  bits_for:", *(f"    - '{rule}'" for rule in found["bits_for"])]
    return "\n".join(lines)


def _groups(model: PreTrainedModel) -> dict[str, dict[str, torch.nn.Linear | Conv1D]]:
    """Name of each sublayer of each block ("model.layers.0.mlp") -> its linear layers by name."""
    prefix, _ = decoder_blocks(model)
    found: dict[str, dict[str, torch.nn.Linear | Conv1D]] = defaultdict(dict)
    for name, module in block_linears(model).items():
        index, sublayer, *_ = name.removeprefix(prefix + ".").split(".")
        found[f"{prefix}.{index}.{sublayer}"][name] = module
    return found


@contextmanager
def _rounded(modules: dict[str, torch.nn.Linear | Conv1D], options: SensitivityOptions) -> Iterator[None]:
    """The modules with their weights rounded meanwhile."""
    kept = {name: module.weight.detach().clone() for name, module in modules.items()}
    with torch.no_grad():
        for name, module in modules.items():
            weight = kept[name].T if isinstance(module, Conv1D) else kept[name]
            rounded = round_to_nearest(name, weight.contiguous().numpy(), options.bits, options.group_size, False).dequantized()
            module.weight.copy_(torch.from_numpy(rounded.T if isinstance(module, Conv1D) else rounded))
        try:
            yield
        finally:
            for name, module in modules.items():
                module.weight.copy_(kept[name])
