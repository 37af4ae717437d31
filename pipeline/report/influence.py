"""The table of layer influences, from the influence.json that prune writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.report.text import table


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its Block Influence, and whether it was removed."""

    layer: int
    influence: float
    removed: bool


@dataclass(frozen=True)
class Round:
    """KL in nats for each layer, by its index, that was skipped alone. healed: those for which something made up."""

    kl: dict[str, float] = field(default_factory=dict)
    healed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Influences:
    """criterion: how layers were chosen. rank_correlation_of_halves: between the influences from two halves of the text."""

    layers: tuple[Layer, ...]
    rounds: tuple[Round, ...] = ()
    criterion: str = ""
    rank_correlation_of_halves: float | None = None


def read_influences(file: Path) -> Influences:
    """Raises InputError for a file that is absent or damaged."""
    try:
        return typed(Influences, read_json(file), "influence")
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); run edgepress prune again") from error


def influence_table(content: Influences) -> str:
    """A line a layer."""
    alone = content.rounds[0].kl if content.rounds else {}
    measured_as = "KL when removed alone" + (", healed" if content.rounds and content.rounds[0].healed else "")
    rows = [["layer", "influence", *([measured_as] if alone else []), ""]]
    for row in content.layers:
        index = str(row.layer)
        measured = [f"{alone[index]:.4f}" if index in alone else ""] if alone else []
        rows.append([index, f"{row.influence:.4f}", *measured, "removed" if row.removed else ""])
    stability = content.rank_correlation_of_halves
    note = f"\n\nrank correlation of the influences from two halves of the text: {stability:.2f}" if stability is not None else ""
    return table(rows) + note
