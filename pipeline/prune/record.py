"""influence.json and its picture: what was measured of every layer, and how the choice was made."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from edgepress.pipeline.files import JsonObject, write_json
from edgepress.pipeline.prune.criteria import Choice, Round, Trial
from edgepress.pipeline.prune.influence import Influence

log = logging.getLogger("edgepress")
# Those of the manifest's facts that are repeated here.
_FACTS = (
    "criterion", "removed_layers", "parts", "removed_parts",
    "held_out_perplexity", "rank_correlation_of_halves", "evaluations", "evaluation_seconds",
    "calibration",
)  # fmt: skip


def write_influence(out: Path, facts: JsonObject, influence: Influence, choice: Choice) -> None:
    """influence.json, a row a layer and how the choice was made, and its picture where matplotlib is installed."""
    influences, halves = rounded(influence), influence.halves()
    rows = [
        {
            "layer": index,
            "influence": value,
            "halves": [round(float(half[index]), 6) for half in halves],
            "removed": index in choice.removed,
        }
        for index, value in enumerate(influences)
    ]
    content = {key: facts[key] for key in _FACTS if key in facts} | {
        "layers": rows,
        "angular_distance": {str(n): influence.angular_distance(n).round(6).tolist() for n in influence.angles},
        "rounds": [_round(one) for one in choice.rounds] + _sets(choice.sets),
        "held_out_path": [
            {
                "layers": step.layers,
                **({} if step.loss_growth is None else {"held_out_loss_growth": round(step.loss_growth, 6)}),
                **({} if step.kl is None else {"kl": round(step.kl, 6)}),
            }
            for step in choice.path
        ],
    }
    write_json(out / "influence.json", content)
    _draw(out / "influence.png", influences, choice.removed)


def rounded(influence: Influence) -> list[float]:
    """Block Influence as it is recorded, one number a layer."""
    return [round(float(value), 6) for value in influence.block_influence]


def _round(one: Round) -> JsonObject:
    costs = {str(index): round(cost, 6) for index, cost in one.kl.items()}
    return {"removed": one.removed, "kl": costs, "healed": one.healed, "seconds": round(one.seconds, 2)}


def _sets(trials: Sequence[Trial]) -> list[JsonObject]:
    return [{"sets": [{"layers": one.layers, "kl": round(one.kl, 6)} for one in trials]}] if trials else []


def _draw(file: Path, influences: list[float], removed: list[int]) -> None:
    """The report's picture of influence by layer. Without matplotlib a line in the log names what is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no %s: matplotlib is not installed (in a clone of edgepress: pip install '.[report]')", file.name)
        return
    from edgepress.pipeline.report.plots import influence_figure

    influence_figure(influences, removed).savefig(file, dpi=120)
