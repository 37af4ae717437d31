"""What a healer works on: the model with its gaps, and the whole model's states."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import HealOptions


@dataclass(frozen=True)
class Gap:
    """A run of removed blocks, or a block that lacks a part, as the model without them sees it.

    before: index in the pruned model of the block before the gap, -1 for the embedding; or of the block that lacks a part. target:
    index in the whole model of the block after the gap (the number of its blocks when the last is gone or lacks a part): what
    enters it is what should leave ``before``.
    """

    before: int
    target: int


@dataclass(frozen=True)
class HealJob:
    """The model to heal, and what it may learn from.

    student: the model without the layers, in memory, changed in place by a healer. teacher: states of the whole model over
    ``windows``: index of a block -> (tokens of all windows, hidden), float32, what enters that block; the greatest index is the
    number of its blocks. selection: texts that strengths are chosen on, of the same kind and of another, disjoint from all
    other sets; without the other kind, a short calibration text would be memorized. scratch: a folder for checkpoints of long
    work, kept when the work is interrupted.
    """

    student: Blocks
    gaps: list[Gap]
    windows: list[np.ndarray]
    teacher: dict[int, np.ndarray]
    selection: list[list[np.ndarray]]
    options: HealOptions
    scratch: Path

    def loss(self) -> float:
        """Mean over the texts of ``selection`` of the student's loss, in nats a token."""
        return float(np.mean([mean_loss(self.student, windows) for windows in self.selection]))

    def starts(self) -> np.ndarray:
        """Where each window begins among the rows of ``teacher``, and where the last one ends."""
        return np.cumsum([0, *map(len, self.windows)])


def gaps_of(kept: list[int], layers: int, lacking: Collection[int] = (), empty: Collection[int] = ()) -> list[Gap]:
    """The gaps in a list of kept block indices of a model with ``layers``.

    lacking: those of the pruned model that lack a part; empty: that lack both, and are as good as removed.
    """
    places = [(-1, -1), *((index, former) for index, former in enumerate(kept) if index not in empty)]
    following = [*(former for _, former in places[1:]), layers]
    return [
        Gap(index, after)
        for (index, former), after in zip(places, following, strict=True)
        if after - former > 1 or index in lacking
    ]
