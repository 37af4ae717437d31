"""Layer removal: measure what each decoder block does, choose, cut the checkpoint, and prove it on the reloaded one."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from edgepress.models.config import layer_count_key
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import folder_bytes, read_json, sha256, write_json
from edgepress.pipeline.metrics.torch_scores import mean_loss, perplexity
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune.criteria import Choice, choose, listed
from edgepress.pipeline.prune.influence import Influence, measure_influence
from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.text.calibration import calibration

log = logging.getLogger("edgepress")


def prune(source: Artifact, out: Path, options: PruneOptions) -> dict[str, Any]:
    """Write the checkpoint without the chosen blocks into ``out``, with influence.json and .png; returns the manifest's facts.

    Raises OptionError when no block would be left, ModelError when the architecture's config cannot express what would be
    left, ProofError when the checkpoint written does not compute what the original computes with those blocks skipped.
    """
    options = options.resolved()
    raw = read_json(source.path / "config.json")
    layers = raw[layer_count_key(raw)]
    amount = options.amount(layers)
    if len(options.remove_layers) == 1:  # --remove-layers used to take a count
        log.info("prune: the layer of index %d goes (for a number of layers: --remove-count)", options.remove_layers[0])
    if options.remove_layers:  # what cannot be is said before minutes are spent on measuring
        pruned_config(source.path, _others(layers, options.remove_layers), options.trust_remote_code)
    ranking, held_out = calibration(source.path, options)
    model = load_model(source.path, options.trust_remote_code)
    blocks = Blocks(model)
    influence = measure_influence(blocks, ranking, _run_lengths(options, amount))
    choice = choose(options, amount, blocks, influence, ranking, held_out)
    kept = _others(layers, choice.removed)
    config = pruned_config(source.path, kept, options.trust_remote_code)
    before = mean_loss(model, held_out)

    probe = torch.from_numpy(ranking[0])[None]
    parameters, name = model.num_parameters(), blocks.name
    with blocks.without(choice.removed):
        wanted = blocks.logits(probe)
    del model, blocks  # the pruned one is loaded next: both need not stand in memory together

    remove_blocks(source.path, out, name, kept, config)
    pruned = load_model(out, options.trust_remote_code)
    with torch.inference_mode():
        found = pruned(input_ids=probe, use_cache=False).logits
    if not torch.equal(found, wanted):
        raise ProofError(
            f"without layers {choice.removed} the checkpoint computes something else than the model with them skipped "
            f"(largest difference {float((found - wanted).abs().max()):.3g}); {source.family} keeps per-layer settings that its "
            "config cannot express for these layers, so nothing was written"
        )
    perplexities = [perplexity(loss) for loss in (before, mean_loss(pruned, held_out))]
    _report(choice.removed, layers, perplexities)
    facts = {
        "criterion": options.criterion,
        "influences": [round(float(value), 6) for value in influence.block_influence],
        "removed_layers": choice.removed,
        "layers": [layers, layers - len(choice.removed)],
        "parameters": [parameters, pruned.num_parameters()],
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
        "held_out_perplexity": perplexities,
        "evaluations": choice.evaluations,
        "evaluation_seconds": round(choice.seconds, 2),
        "calibration": {
            "sha256": sha256(options.calibration),
            "ranking_positions": sum(map(len, ranking)),
            "held_out_positions": sum(map(len, held_out)),
        },
        "proof": {"tokens": probe.shape[1], "largest_logit_difference": 0.0},
    }
    if (stability := influence.stability()) is not None:
        facts["rank_correlation_of_halves"] = stability
    write_influence(out, facts, influence, choice)
    return facts


def _run_lengths(options: PruneOptions, amount: int) -> list[int]:
    """Of the runs whose angular distance is needed."""
    if options.criterion == "angular" and options.max_loss is not None:
        return list(range(1, amount + 1))
    return [amount] if amount and options.criterion in ("angular", "greedy") else []


def _others(layers: int, removed: tuple[int, ...] | list[int]) -> list[int]:
    return [index for index in range(layers) if index not in removed]


def _report(removed: list[int], layers: int, perplexities: list[float]) -> None:
    before, after = perplexities
    said = "prune: removed %s of %d; perplexity of held-out calibration text %.4g -> %.4g"
    log.info(said, listed(removed), layers, before, after)
    if after > WORRYING * before:
        log.warning("warning: without these layers the model is badly hurt; remove fewer or none, or set a limit: --max-loss 0.1")


def write_influence(out: Path, facts: dict[str, Any], influence: Influence, choice: Choice) -> None:
    """influence.json, a row a layer and how the choice was made, and its picture where matplotlib is installed."""
    halves = influence.halves()
    rows = [
        {
            "layer": index,
            "influence": value,
            "halves": [round(float(half[index]), 6) for half in halves],
            "removed": index in choice.removed,
        }
        for index, value in enumerate(facts["influences"])
    ]
    kept = ("criterion", "removed_layers", "held_out_perplexity", "rank_correlation_of_halves", "evaluations", "evaluation_seconds")
    angular = {str(length): influence.angular_distance(length).round(6).tolist() for length in influence.angles}
    content = {key: facts[key] for key in (*kept, "calibration") if key in facts}
    content |= {"layers": rows, "angular_distance": angular, "rounds": choice.rounds, "held_out_path": choice.path}
    write_json(out / "influence.json", content)
    draw(out / "influence.png", facts["influences"], choice.removed)


def draw(file: Path, influences: list[float], removed: list[int]) -> None:
    """The report's picture of influence by layer. Without matplotlib a line in the log says what is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no %s: matplotlib is not installed (in a clone of edgepress: pip install '.[report]')", file.name)
    else:
        from edgepress.pipeline.report.plots import influence_figure

        influence_figure(influences, removed).savefig(file, dpi=120)
