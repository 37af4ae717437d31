"""What each group of matrices costs when it alone is quantized: where to spend more bits (KL divergence on calibration text)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from edgepress.pipeline.checkpoint.blocks import Blocks, block_linears, decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.options import SensitivityOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.text.windows import text_windows
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class GroupCost:
    """What it costs to round one sublayer (attention, mlp) of one block, and nothing else, to nearest.

    pattern: regular expression that matches its matrices. weights: how many it has. kl: mean KL(original || rounded) in nats
    a token. top1: share of tokens whose most likely successor is unchanged. bytes: what ``better_bits`` would add.
    """

    group: str
    pattern: str
    weights: int
    kl: float
    top1: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """The cost of every group at ``bits`` and ``group_size``, and the ``bits_for`` rules proposed from it."""

    bits: int
    group_size: int
    rows: tuple[GroupCost, ...]
    bits_for: tuple[str, ...]

    def to_json(self, model: str) -> JsonObject:
        """The content of sensitivity.json; model: name of the checkpoint."""
        return {"model": model, **asdict(self)}


def measure(checkpoint: Checkpoint, options: SensitivityOptions) -> Sensitivity:
    """The cost of each sublayer (attention, mlp) of each block, and a proposal of ``bits_for`` rules.

    The proposal takes groups by KL per added byte until ``extra`` is spent. KL of single groups does not add up exactly:
    the proposal is a good guess, to be measured like any recipe.
    """
    windows = text_windows(
        options.calibration, checkpoint.path, budget=options.calibration_tokens, skip=options.calibration_skip, shortest=16
    )
    model = checkpoint.model()
    blocks = Blocks(model)
    last = len(blocks)
    originals = [blocks.states(torch.from_numpy(ids)[None], [last])[last][0] for ids in windows]
    rows, groups = [], _groups(model)
    log.info("sensitivity: %d groups, each rounded alone and measured on %d tokens", len(groups), sum(map(len, windows)))
    for name, modules in progress(groups.items(), "sensitivity", "group"):
        with rounded(modules, options.bits, options.group_size):
            scores = Quality()
            for ids, original in zip(windows, originals, strict=True):
                hidden = blocks.states(torch.from_numpy(ids)[None], [last])[last][0]
                for positions, truth in blocks.heads(original[:-1]):  # of the blocks alone matrices are rounded: one head for both
                    (_, logits), *_ = blocks.heads(hidden[positions])
                    scores.add_part(ids[1:][positions], logits.numpy(), truth.numpy())
        figures, weights = scores.figures(), sum(m.weight.numel() for m in modules.values())
        rows.append(
            GroupCost(
                name,
                re.escape(name).replace("\\.", ".") + ".*",
                weights,
                figures["kl_mean"],
                figures["top1_agreement"],
                weights * (options.better_bits - options.bits) // 8,
            )
        )
    return Sensitivity(options.bits, options.group_size, tuple(rows), propose(rows, options))


def propose(rows: Sequence[GroupCost], options: SensitivityOptions) -> tuple[str, ...]:
    """``bits_for`` rules for the groups that gain most per byte, within ``extra`` of the bytes at ``bits``."""
    budget = options.extra * sum(row.weights for row in rows) * options.bits / 8
    rules = []
    for row in sorted(rows, key=lambda row: -row.kl / max(row.bytes, 1)):
        if row.bytes <= budget:
            budget -= row.bytes
            rules.append(f"{row.pattern}={options.better_bits}")
    return tuple(rules)


def table(sensitivity: Sensitivity) -> str:
    """The rows as text, most sensitive first, and the proposal as flags."""
    lines = [f"{'group':<40} {'KL, nat':>9} {'top-1':>8} {'weights':>12}"]
    for row in sorted(sensitivity.rows, key=lambda row: -row.kl):
        lines.append(f"{row.group:<40} {row.kl:>9.5f} {100 * row.top1:>6.1f} % {row.weights:>12,}")
    if rules := sensitivity.bits_for:
        lines += ["", "more bits for the first of these:", " ".join(f"--bits-for '{rule}'" for rule in rules)]
        lines += ["", "or in a recipe:", "quantize:", "  bits_for:", *(f"    - '{rule}'" for rule in rules)]
    return "\n".join(lines)


def _groups(model: PreTrainedModel) -> dict[str, dict[str, torch.nn.Linear | Conv1D]]:
    """Name of each sublayer of each block ("model.layers.0.mlp") -> its linear layers by name."""
    prefix, _ = decoder_blocks(model)
    groups: dict[str, dict[str, torch.nn.Linear | Conv1D]] = defaultdict(dict)
    for name, module in block_linears(model).items():
        index, sublayer, *_ = name.removeprefix(prefix + ".").split(".")
        groups[f"{prefix}.{index}.{sublayer}"][name] = module
    return groups
