"""Removal of layers or of parts of them: measure what each does, choose, cut the checkpoint, and prove it on the reloaded one."""

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
from edgepress.pipeline.checkpoint.forwards import by_onednn
from edgepress.pipeline.checkpoint.parts import has_parts, known_with_parts, parameters_left, part_name
from edgepress.pipeline.checkpoint.update import carry_files, link_weights
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.files import JsonObject, folder_bytes, sha256, write_json
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import mean_loss, perplexity
from edgepress.pipeline.options import BLOCKS, PruneOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.prune.criteria import Choice, choose
from edgepress.pipeline.prune.influence import Influence
from edgepress.pipeline.prune.parts import Parts, influence_of, silence
from edgepress.pipeline.prune.record import rounded, write_influence
from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.text.calibration import calibration, other_halves
from edgepress.pipeline.vocabulary import PARTS

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class _Plan:
    """What was chosen on the original, and what the pruned checkpoint must compute.

    parts: what is removed, as ``options.PARTS`` names it. config: config.json without the removed blocks. block_list: name of the
    list of blocks. loss: on held-out text, nats a token. probe: token ids (1, tokens). logits: of the probe with the removed
    blocks or parts skipped, (1, tokens, vocabulary), None where none is removed.
    """

    parts: str
    influence: Influence
    choice: Choice
    config: JsonObject
    block_list: str
    parameters: int
    loss: float
    probe: torch.Tensor
    logits: torch.Tensor | None


def prune(source: Artifact, out: Path, options: PruneOptions) -> JsonObject:
    """Write the checkpoint without the chosen blocks or parts into ``out``, with influence.json and .png; returns the facts.

    Raises OptionError when no block would be left, ModelError when the architecture's config cannot express what would be
    left, ProofError when the written checkpoint's logits differ from the original's with what was removed skipped.
    """
    options = options.resolved()
    checkpoint = Checkpoint(source.path, options.trust_remote_code)
    layers, absent = checkpoint.layers, _absent(checkpoint, options.parts)
    options.amount(layers, absent)  # what is impossible is refused before minutes are spent on measuring
    read = checkpoint.remarks("prune")
    if len(options.remove_layers) == 1 and options.parts == BLOCKS:  # --remove-layers used to take a count
        log.info("prune: removing the layer with index %d (for a number of layers: --remove-count)", options.remove_layers[0])
    if options.remove_layers and options.parts == BLOCKS:
        _check_attention(checkpoint, options.remove_layers)
        pruned_config(checkpoint, _others(layers, options.remove_layers))
    options = with_text(options, source.path)
    ranking, held_out = calibration(source.path, options)
    other = other_halves(source.path, options) if options.criterion == "healed" else None
    plan = _plan(checkpoint, options, absent, ranking, held_out, other)
    if options.parts == BLOCKS:
        _check_attention(checkpoint, plan.choice.removed)
    if plan.choice.removed:
        parameters, loss = _written(checkpoint, source.family, out, plan, held_out)
    else:
        parameters, loss = _kept(checkpoint, out, plan, bool(source.steps))
    perplexities = [perplexity(plan.loss), perplexity(loss)]
    _report(plan, layers, perplexities)
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


def _absent(checkpoint: Checkpoint, part: str) -> list[int]:
    """The layers that lack the part already. Raises ModelError where blocks have no such parts."""
    if part == BLOCKS:
        return []
    kind = str(checkpoint.raw_config.get("model_type"))
    if not has_parts(kind):
        raise ModelError(
            f"--parts {part} is for architectures of the fused graph ({', '.join(known_with_parts())}), not {kind}; leave it out"
        )
    return [index for index in range(checkpoint.layers) if part_name(index, part) in checkpoint.silent]


def _check_attention(checkpoint: Checkpoint, removed: Sequence[int]) -> None:
    """Raise ModelError where all layers that would stay have lost their attention: nothing would see the text."""
    kept = _others(checkpoint.layers, removed)
    if checkpoint.silent and all(part_name(index, "attention") in checkpoint.silent for index in kept):
        raise ModelError(
            f"without layers {', '.join(map(str, removed))} no layer would have attention, which others lost before; "
            "remove other layers, by --remove-layers"
        )


def _plan(
    checkpoint: Checkpoint,
    options: PruneOptions,
    absent: list[int],
    ranking: list[np.ndarray],
    held_out: list[np.ndarray],
    other: tuple[list[np.ndarray], list[np.ndarray]] | None,
) -> _Plan:
    """Measure and choose on the original, which is out of memory when this returns: the pruned model is loaded next."""
    model, whole = checkpoint.model(), options.parts == BLOCKS
    blocks = Blocks(model) if whole else Parts(model, options.parts, absent)
    amount = options.amount(checkpoint.layers, absent)
    influence = influence_of(blocks, ranking, _run_lengths(options, amount))
    choice = choose(options, amount, blocks, influence, ranking, held_out, other)
    config = pruned_config(checkpoint, _others(checkpoint.layers, choice.removed)) if whole else checkpoint.raw_config
    loss = mean_loss(blocks, held_out)
    warn_unless_readable(loss, model.config.vocab_size, options.calibration)
    if other:
        warn_unless_readable(mean_loss(blocks, other[1][:1]), model.config.vocab_size, options.other_text)
    probe = torch.from_numpy(ranking[0])[None]
    logits = None
    if choice.removed:
        with blocks.without(choice.removed):
            logits = blocks.logits(probe)
    parameters = parameters_left(model, checkpoint.silent)
    return _Plan(options.parts, influence, choice, config, blocks.name, parameters, loss, probe, logits)


def _written(checkpoint: Checkpoint, family: str, out: Path, plan: _Plan, held_out: list[np.ndarray]) -> tuple[int, float]:
    """Write the checkpoint without what was chosen, prove it, and return its parameters and its loss on held-out text."""
    if plan.parts == BLOCKS:
        remove_blocks(checkpoint, out, plan.block_list, _others(checkpoint.layers, plan.choice.removed), plan.config)
    else:
        silence(checkpoint, out, plan.parts, plan.choice.removed)
    written = Checkpoint(out, checkpoint.trust_remote_code)
    pruned = written.model()
    _prove(plan, pruned, family)
    return parameters_left(pruned, written.silent), mean_loss(pruned, held_out)


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
    """Raise ProofError unless the reloaded checkpoint computes what the original does with what was removed skipped."""
    with torch.inference_mode(), by_onednn(pruned.modules()):  # as the plan's were made
        logits = pruned(input_ids=plan.probe, use_cache=False).logits
    assert plan.logits is not None
    whole = plan.parts == BLOCKS
    if not torch.equal(logits, plan.logits):
        raise ProofError(
            f"without {_of(plan)}layers {plan.choice.removed} the written checkpoint's logits differ from the original's with "
            f"those skipped (largest difference {float((logits - plan.logits).abs().max()):.3g}), so nothing was written; "
            + (f"{family} keeps per-layer settings that its config cannot express; remove other layers" if whole else "report this")
        )


def _run_lengths(options: PruneOptions, amount: int) -> list[int]:
    """Lengths of the runs whose angular distance is needed."""
    if options.criterion == "angular" and options.max_loss is not None:
        return list(range(1, amount + 1))
    if options.parts != BLOCKS:
        return []
    return [amount] if amount and options.criterion in ("angular", "greedy", "healed") else []


def _others(layers: int, removed: Sequence[int]) -> list[int]:
    return [index for index in range(layers) if index not in removed]


def _report(plan: _Plan, layers: int, perplexities: list[float]) -> None:
    (before, after), removed = perplexities, plan.choice.removed
    summary = "prune: %s%d of %d layers removed (%s); perplexity of held-out calibration text %.4g -> %.4g"
    log.info(summary, _of(plan), len(removed), layers, ", ".join(map(str, removed)) or "none", before, after)
    if after > WORRYING * before:
        log.warning("warning: without them the model is badly degraded; remove fewer or none, or set a limit: --max-loss 0.1")


def _of(plan: _Plan) -> str:
    """``the attention of ``; empty for whole layers."""
    return f"the {PARTS[plan.parts]} of " if PARTS[plan.parts] else ""


def _choice_facts(options: PruneOptions, plan: _Plan, layers: int) -> JsonObject:
    removed, whole = plan.choice.removed, plan.parts == BLOCKS
    return {
        "criterion": plan.choice.criterion,
        "influences": rounded(plan.influence),
        "removed_layers": removed if whole else [],
        "layers": [layers, layers - len(removed) if whole else layers],
        **({} if whole else {"parts": plan.parts, "removed_parts": removed}),
    }
