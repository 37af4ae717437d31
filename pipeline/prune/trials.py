"""What a removal costs: the model without a block, measured against the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import batches, divergences_of
from edgepress.pipeline.progress import bar


class Trials:
    """Removals tried one by one: the model as it is without the block. tried: how many so far."""

    def __init__(self, blocks: Blocks, windows: list[np.ndarray]) -> None:
        """windows: what is measured on. The model must be whole."""
        last = len(blocks)
        self.blocks, self._parts, self.tried = blocks, batches(blocks.model, windows), 0
        self._original = [blocks.states(ids, [last])[last] for ids, _ in self._parts]

    @property
    def healed(self) -> list[int]:
        """The candidates of the last ``costs`` that were healed."""
        return []

    def costs(self, removed: Sequence[int], candidates: Sequence[int], label: str) -> dict[int, float]:
        """Mean KL(whole model || without ``removed`` and one candidate), in nats a token, for each candidate.

        All candidates share the blocks before them: each starts from the state that enters it in the model without ``removed``.
        """
        blocks, last, sums, tokens = self.blocks, len(self.blocks), dict.fromkeys(candidates, 0.0), 0
        starts = {index: self._start(removed, index) for index in candidates}
        self.tried += len(candidates)
        with bar(label, len(self._parts) * len(candidates), "trial") as shown:
            for (ids, real), original in zip(self._parts, self._original, strict=True):
                with blocks.without(removed):
                    states = blocks.states(ids, sorted(set(starts.values())))
                leaving = []
                for index, start in starts.items():
                    with self._tried(index), blocks.entering(start, states[start]), blocks.without([*removed, index]):
                        leaving.append(blocks.states(ids, [last])[last])
                    shown.update()
                for index, found in zip(starts, divergence_sums(blocks, original, leaving, real), strict=True):
                    sums[index] += found
                tokens += int(real.sum())
        return {index: total / tokens for index, total in sums.items()}

    def remove(self, index: int) -> None:
        """The candidate ``index`` of the last ``costs`` is gone from now on."""

    def unhealed(self) -> AbstractContextManager[None]:
        """The weights as they were, within the context."""
        return nullcontext()

    def _start(self, removed: Sequence[int], candidate: int) -> int:
        """The first block that a trial computes."""
        return candidate

    def _tried(self, candidate: int) -> AbstractContextManager[None]:
        """What else is changed while a candidate is tried."""
        return nullcontext()


def divergence_sums(blocks: Blocks, original: torch.Tensor, others: list[torch.Tensor], real: torch.Tensor) -> list[float]:
    """Sums of KL(original || other) over real tokens, from the states (batch, tokens, hidden) that leave the last block."""
    rows = divergences_of(blocks, original[real], [hidden[real] for hidden in others])
    return [float(found.double().sum()) for found in rows]
