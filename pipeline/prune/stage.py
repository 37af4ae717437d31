"""Layer removal: measure what each decoder block does, choose, cut the checkpoint, and prove it on the reloaded one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.update import carry_files, link_weights
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import JsonObject, folder_bytes, sha256, write_json
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import mean_loss, perplexity
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.prune.criteria import Choice, choose
from edgepress.pipeline.prune.influence import Influence, measure_influence
from edgepress.pipeline.prune.record import rounded, write_influence
from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.text.calibration import calibration, other_halves

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class _Plan:
    """What was chosen on the original, and what the pruned checkpoint must compute.

    config: config.json without the removed blocks. block_list: name of the list of blocks. loss: on held-out text, nats a token.
    probe: token ids (1, tokens). logits: of the probe with the removed blocks skipped, (1, tokens, vocabulary),
    None where none is removed.
    """

    influence: Influence
    choice: Choice
    config: JsonObject
    block_list: str
    parameters: int
    loss: float
    probe: torch.Tensor
    logits: torch.Tensor | None


def prune(source: Artifact, out: Path, options: PruneOptions) -> JsonObject:
    """Write the checkpoint without the chosen blocks into ``out``, with influence.json and .png; returns the manifest's facts.

    Raises OptionError when no block would be left, ModelError when the architecture's config cannot express what would be
    left, ProofError when the written checkpoint's logits differ from the original's with those blocks skipped.
    """
    options = options.resolved()
    checkpoint = Checkpoint(source.path, options.trust_remote_code)
    layers = checkpoint.layers
    options.amount(layers)  # what is impossible is refused before minutes are spent on measuring
    read = checkpoint.remarks("prune")
    if len(options.remove_layers) == 1:  # --remove-layers used to take a count
        log.info("prune: removing the layer with index %d (for a number of layers: --remove-count)", options.remove_layers[0])
    if options.remove_layers:
        pruned_config(checkpoint, _others(layers, options.remove_layers))
    options = with_text(options, source.path)
    ranking, held_out = calibration(source.path, options)
    other = other_halves(source.path, options) if options.criterion == "healed" else None
    plan = _plan(checkpoint, options, ranking, held_out, other)
    if plan.choice.removed:
        parameters, loss = _written(checkpoint, source.family, out, plan, held_out)
    else:
        parameters, loss = _kept(checkpoint, out, plan, bool(source.steps))
    perplexities = [perplexity(plan.loss), perplexity(loss)]
    _report(plan.choice.removed, layers, perplexities)
    facts = (
        read
        | _choice_facts(options, plan, layers)
        | {
            "parameters": [plan.parameters, parameters],
            "bytes": [folder_bytes(source.path), folder_bytes(out)],
            "held_out_perplexity": perplexities,
            "evaluations": plan.choice.evaluations,
            "evaluation_seconds": round(plan.choice.seconds, 2),
            "calibration": {
                "sha256": sha256(options.calibration),
                **({"other_text_sha256": sha256(options.other_text)} if other else {}),
                "ranking_positions": sum(map(len, ranking)),
                "held_out_positions": sum(map(len, held_out)),
            },
            "proof": {"tokens": plan.probe.shape[1], "largest_logit_difference": 0.0},
        }
    )
    if (stability := plan.influence.stability()) is not None:
        facts["rank_correlation_of_halves"] = stability
    write_influence(out, facts, plan.influence, plan.choice)
    return facts


def _plan(
    checkpoint: Checkpoint,
    options: PruneOptions,
    ranking: list[np.ndarray],
    held_out: list[np.ndarray],
    other: tuple[list[np.ndarray], list[np.ndarray]] | None,
) -> _Plan:
    """Measure and choose on the original, which is out of memory when this returns: the pruned model is loaded next."""
    model = checkpoint.model()
    blocks, amount = Blocks(model), options.amount(checkpoint.layers)
    influence = measure_influence(blocks, ranking, _run_lengths(options, amount))
    choice = choose(options, amount, blocks, influence, ranking, held_out, other)
    config = pruned_config(checkpoint, _others(checkpoint.layers, choice.removed))
    loss = mean_loss(blocks, held_out)
    warn_unless_readable(loss, model.config.vocab_size, options.calibration)
    probe = torch.from_numpy(ranking[0])[None]
    logits = None
    if choice.removed:
        with blocks.without(choice.removed):
            logits = blocks.logits(probe)
    return _Plan(influence, choice, config, blocks.name, model.num_parameters(), loss, probe, logits)


def _written(checkpoint: Checkpoint, family: str, out: Path, plan: _Plan, held_out: list[np.ndarray]) -> tuple[int, float]:
    """Write the checkpoint without the chosen blocks, prove it, and return its parameters and its loss on held-out text."""
    remove_blocks(checkpoint, out, plan.block_list, _others(checkpoint.layers, plan.choice.removed), plan.config)
    pruned = Checkpoint(out, checkpoint.trust_remote_code).model()
    _prove(plan, pruned, family)
    return pruned.num_parameters(), mean_loss(pruned, held_out)


def _kept(checkpoint: Checkpoint, out: Path, plan: _Plan, ours: bool) -> tuple[int, float]:
    """The checkpoint as it is: weights that edgepress wrote (``ours``) are not written again, and nothing is measured twice."""
    if ours:
        link_weights(checkpoint.path, out)
    else:
        checkpoint.rewrite(out, lambda name: name)
    carry_files(checkpoint.path, out, checkpoint.trust_remote_code)
    write_json(out / "config.json", plan.config)
    return plan.parameters, plan.loss


def _prove(plan: _Plan, pruned: torch.nn.Module, family: str) -> None:
    """Raise ProofError unless the reloaded checkpoint computes what the original does with the removed blocks skipped."""
    with torch.inference_mode():
        logits = pruned(input_ids=plan.probe, use_cache=False).logits
    assert plan.logits is not None
    if not torch.equal(logits, plan.logits):
        raise ProofError(
            f"without layers {plan.choice.removed} the written checkpoint's logits differ from the original's with those layers "
            f"skipped (largest difference {float((logits - plan.logits).abs().max()):.3g}); {family} keeps per-layer settings that "
            "its config cannot express for these layers, so nothing was written; remove other layers"
        )


def _run_lengths(options: PruneOptions, amount: int) -> list[int]:
    """Lengths of the runs whose angular distance is needed."""
    if options.criterion == "angular" and options.max_loss is not None:
        return list(range(1, amount + 1))
    return [amount] if amount and options.criterion in ("angular", "greedy", "healed") else []


def _others(layers: int, removed: Sequence[int]) -> list[int]:
    return [index for index in range(layers) if index not in removed]


def _report(removed: list[int], layers: int, perplexities: list[float]) -> None:
    before, after = perplexities
    summary = "prune: %d of %d layers removed (%s); perplexity of held-out calibration text %.4g -> %.4g"
    log.info(summary, len(removed), layers, ", ".join(map(str, removed)) or "none", before, after)
    if after > WORRYING * before:
        log.warning(
            "warning: without these layers the model is badly degraded; remove fewer or none, or set a limit: --max-loss 0.1"
        )


def _choice_facts(options: PruneOptions, plan: _Plan, layers: int) -> JsonObject:
    return {
        "criterion": plan.choice.criterion,
        "influences": rounded(plan.influence),
        "removed_layers": plan.choice.removed,
        "layers": [layers, layers - len(plan.choice.removed)],
    }
