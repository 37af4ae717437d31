"""What a removal costs after healing: the matrix before the gap has then learned what the removed block wrote.

A block that costs little as it goes may be hard to make up for, and the other way round. So each trial is a removal with its
closed form, near to that of ``heal --healer linear`` (one strength, no bias; after ReplaceMe, Shopkhoev et al. 2025): the last
matrix of the block before is solved for on one part of the text, the divergence measured on another. The chosen change stays for
the removals that follow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, Blocks
from edgepress.pipeline.checkpoint.least_squares import Sums, Target, add_to, inputs_of, last_matrix
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.machine import memory_budget
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress
from edgepress.pipeline.prune.trials import Trials
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
_SUMS = 0.25  # of the memory, what the sums of candidates may take
# Times a limit, a KL divergence that healing will not bring within it: of what the cheapest removal costs as it goes, one of the
# reference model's layers came down to a fifth, SmolLM2's to two thirds, Qwen's to four fifths (docs/layer-removal.md).
HOPELESS = 6.0
RIDGE = 0.3  # times the mean of the Gram matrix's diagonal: what held-out text chose most often at gaps of SmolLM2-135M


@dataclass(frozen=True)
class Gap:
    """What a candidate's removal leaves: the block that changes, and the block of the whole model that follows."""

    before: int
    target: int


@dataclass(frozen=True)
class _Change:
    """What makes up for a removal: added to the matrix, (in, hidden)."""

    matrix: torch.nn.Linear | Conv1D
    added: torch.Tensor


class HealedTrials(Trials):
    """Removals tried with their healing: the model is changed in place, and put back by ``restore``."""

    def __init__(self, blocks: Blocks, windows: list[np.ndarray], fitting: list[np.ndarray], limit: float | None = None) -> None:
        """windows: what is measured on. fitting: what changes are solved on. The model must be whole.

        limit: nats a token that a removal may cost, where one is given.
        """
        super().__init__(blocks, windows)
        self._limit = limit
        self._fitting = batches(blocks.model, fitting)
        self._ids = torch.from_numpy(fitting[0])[None, :32]
        self._former: dict[torch.Tensor, torch.Tensor] = {}  # weights that were changed, and what they were
        self._targets: dict[int, Target | None] = {}  # the last matrix of each block that was asked for
        self._found: dict[int, _Change] = {}

    @property
    def healed(self) -> list[int]:
        """The candidates of the last ``costs`` that something could make up for; the others were judged as they go."""
        return sorted(self._found)

    def costs(self, removed: Sequence[int], candidates: Sequence[int], label: str) -> dict[int, float]:
        """As Trials', once each candidate that can be is made up for; as they go, where healing could not keep to the limit."""
        if self._limit is not None:
            self._found = {}
            as_they_go = super().costs(removed, candidates, label)
            if min(as_they_go.values()) > HOPELESS * self._limit:
                log.info("healing is not tried, for as they go all cost more than %g times what is allowed", HOPELESS)
                return as_they_go
        self._found = self.changes(removed, candidates)
        return super().costs(removed, candidates, label)

    def remove(self, index: int) -> None:
        """As Trials': its change stays, until ``restore``."""
        if (change := self._found.get(index)) is not None:
            self._former.setdefault(change.matrix.weight, change.matrix.weight.detach().clone())
            add_to(change.matrix, change.added)

    def restore(self) -> None:
        """Put back every weight that was changed."""
        for weight, value in self._former.items():
            _set(weight, value)

    def changes(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, _Change]:
        """What makes up for each candidate, where the block before it has such a matrix."""
        gaps = {index: self._gap(removed, index) for index in candidates}
        targets = {index: found for index, gap in gaps.items() if (found := self._target(gap.before)) is not None}
        changes, every, size = dict[int, _Change](), list(targets), self._together(targets)
        for group in (every[first : first + size] for first in range(0, len(every), size)):
            sums = self._sums(removed, {index: gaps[index] for index in group}, {index: targets[index] for index in group})
            for index in group:
                target = targets[index]
                changes[index] = _Change(_linear(target), sums.pop(index).solved(RIDGE).float() / target.factor)
        return changes

    def _together(self, targets: dict[int, Target]) -> int:
        """How many candidates' sums are made in one pass: those of all, or as many as a part of the memory holds."""
        if (budget := memory_budget()) is None or not targets:
            return max(1, len(targets))
        hidden = self.blocks.model.config.get_text_config().hidden_size
        widths = [inputs_of(_linear(target)) for target in targets.values()]
        return max(1, int(_SUMS * budget / max(4 * width * (width + hidden) for width in widths)))

    def _start(self, removed: Sequence[int], candidate: int) -> int:
        return max(self._gap(removed, candidate).before, 0)  # the block that changes

    @contextmanager
    def _tried(self, candidate: int) -> Iterator[None]:
        change = self._found.get(candidate)
        if change is None:
            yield
            return
        kept = change.matrix.weight.detach().clone()
        add_to(change.matrix, change.added)
        try:
            yield
        finally:
            _set(change.matrix.weight, kept)

    @contextmanager
    def unhealed(self) -> Iterator[None]:
        """As Trials': the changes of former removals are taken back."""
        healed = {weight: weight.detach().clone() for weight in self._former}
        self.restore()
        try:
            yield
        finally:
            for weight, value in healed.items():
                _set(weight, value)

    def _gap(self, removed: Sequence[int], candidate: int) -> Gap:
        """Where the candidate's removal leaves a gap; before is -1 where no block precedes it."""
        kept = [index for index in range(len(self.blocks)) if index not in removed and index != candidate]
        before = max((index for index in kept if index < candidate), default=-1)
        return Gap(before, min((index for index in kept if index > candidate), default=len(self.blocks)))

    def _target(self, index: int) -> Target | None:
        """The last matrix of block ``index``, found once; None where there is none."""
        if index not in self._targets:
            try:
                self._targets[index] = self._last_matrix(index) if index >= 0 else None
            except ModelError as error:
                self._targets[index] = None
                log.debug("what follows layer %d is judged as it goes: %s", index, error)
        return self._targets[index]

    def _last_matrix(self, index: int) -> Target:
        return last_matrix(self.blocks, index, self._ids)

    def _sums(self, removed: Sequence[int], gaps: dict[int, Gap], targets: dict[int, Target]) -> dict[int, Sums]:
        """For each gap what enters the matrix before it now, and what is missing behind it.

        A token weighs 1 / its squared length. In float32, as those of several candidates are in memory together.
        """
        hidden = self.blocks.model.config.get_text_config().hidden_size
        sums = {index: Sums.empty(inputs_of(_linear(target)), hidden, torch.float32) for index, target in targets.items()}
        for ids, real in progress(self._fitting, "healing trials", "batch"):
            with self.unhealed():
                wanted = self.blocks.states(ids, sorted({gap.target for gap in gaps.values()}))
            for index, (entering, leaving) in self._streams(ids, removed, gaps, targets).items():
                state = wanted[gaps[index].target][real].float()
                weights = 1 / state.norm(dim=-1, keepdim=True).clamp_min(1e-6)
                sums[index].add(entering[real].float(), state - leaving[real].float(), weights)
        return sums

    def _streams(
        self, ids: torch.Tensor, removed: Sequence[int], gaps: dict[int, Gap], targets: dict[int, Target]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """For each gap what enters the matrix that changes, (batch, tokens, in), and what leaves its block."""
        seen = dict[int, torch.Tensor]()

        def look(index: int, args: BlockArgs) -> None:
            seen[index] = args[0]

        with ExitStack() as stack, self.blocks.without(removed):
            for index in gaps:
                hook = targets[index].matrix.register_forward_pre_hook(lambda _, args, index=index: look(index, args))
                stack.callback(hook.remove)
            states = self.blocks.states(ids, sorted({gap.before + 1 for gap in gaps.values()}))
        leaving = {index: states[gap.before + 1] for index, gap in gaps.items()}
        return {index: (seen[index].reshape(*leaving[index].shape[:2], -1), leaving[index]) for index in gaps}


def can_heal(blocks: Blocks, window: np.ndarray) -> bool:
    """Whether the last matrix of a block can be solved for: of one in the middle that writes anything."""
    writing = [i for i, block in enumerate(blocks.modules) if any(p.ndim == 2 and p.any() for p in block.parameters())]
    try:
        last_matrix(blocks, writing[len(writing) // 2], torch.from_numpy(window)[None, :32])
    except ModelError:
        return False
    return True


def _linear(target: Target) -> torch.nn.Linear | Conv1D:
    """What ``last_matrix`` found, which is no embedding."""
    assert isinstance(target.matrix, torch.nn.Linear | Conv1D)
    return target.matrix


def _set(weight: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)
