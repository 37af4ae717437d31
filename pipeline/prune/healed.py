"""The greedy choice by what a removal costs after healing: the matrix before a gap has then learned what the removed block wrote.

A block that costs little as it goes may be hard to make up for, and the other way round. So each trial is a removal with its
closed form, near to that of ``heal --healer linear`` (one strength, no bias; after ReplaceMe, Shopkhoev et al. 2025): the last
matrix of the block before is solved for on one part of the text, the divergence measured on another. The chosen change stays for
the removals that follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, Blocks
from edgepress.pipeline.checkpoint.least_squares import Sums, Target, add_to, inputs_of, last_matrix
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.metrics.torch_scores import batches, divergences_of
from edgepress.pipeline.progress import bar
from edgepress.pipeline.prune.influence import measure_influence
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
RIDGE = 0.3  # times the mean of the Gram matrix's diagonal: what held-out text chose most often at gaps of SmolLM2-135M


@dataclass(frozen=True)
class _Gap:
    """What a candidate's removal leaves: the kept block before it, and the block of the whole model that follows."""

    before: int
    target: int


@dataclass
class Student:
    """The model under removal: healed in place, and put back at the end.

    removed: blocks that are gone. former: matrices that were changed, and their weights before. targets: the last matrix of each
    block that was asked for, None where there is none.
    """

    blocks: Blocks
    removed: list[int] = field(default_factory=list)
    former: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    targets: dict[int, Target | None] = field(default_factory=dict)

    def gap(self, candidate: int) -> _Gap:
        """Where the candidate's removal leaves a gap; before is -1 where no block precedes it."""
        kept = [index for index in range(len(self.blocks)) if index not in self.removed and index != candidate]
        before = max((index for index in kept if index < candidate), default=-1)
        return _Gap(before, min((index for index in kept if index > candidate), default=len(self.blocks)))

    def target(self, index: int, ids: torch.Tensor) -> Target | None:
        """The last matrix of block ``index``, found once on ids (1, tokens)."""
        if index not in self.targets:
            try:
                self.targets[index] = last_matrix(self.blocks, index, ids) if index >= 0 else None
            except ModelError as error:
                self.targets[index] = None
                log.debug("what follows layer %d is judged as it goes: %s", index, error)
        return self.targets[index]

    def change(self, target: Target, change: torch.Tensor) -> None:
        """Add a change (in, hidden) for good, until ``restore``."""
        matrix = target.matrix
        assert isinstance(matrix, torch.nn.Linear | Conv1D)
        self.former.setdefault(matrix.weight, matrix.weight.detach().clone())
        add_to(matrix, change)

    @contextmanager
    def changed(self, target: Target | None, change: torch.Tensor | None) -> Iterator[None]:
        """With a change within the context, where there is one."""
        if target is None or change is None:
            yield
            return
        weight = target.matrix.weight
        kept = weight.detach().clone()
        assert isinstance(target.matrix, torch.nn.Linear | Conv1D)
        add_to(target.matrix, change)
        try:
            yield
        finally:
            _set(weight, kept)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As the model was, within the context."""
        healed = {weight: weight.detach().clone() for weight in self.former}
        self.restore()
        try:
            yield
        finally:
            for weight, value in healed.items():
                _set(weight, value)

    def restore(self) -> None:
        """Put back every weight that was changed."""
        for weight, value in self.former.items():
            _set(weight, value)


def _set(weight: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def can_heal(blocks: Blocks, window: np.ndarray) -> bool:
    """Whether the last matrix of a block, of one in the middle, can be solved for."""
    try:
        last_matrix(blocks, len(blocks) // 2, torch.from_numpy(window)[None, :32])
    except ModelError:
        return False
    return True


def changes(student: Student, candidates: Sequence[int], windows: list[np.ndarray]) -> dict[int, tuple[Target, torch.Tensor]]:
    """For each candidate that can be healed the matrix before it, and the change (in, hidden) that makes up for its removal."""
    ids = torch.from_numpy(windows[0])[None, :32]
    gaps = {index: student.gap(index) for index in candidates}
    targets = {index: found for index, gap in gaps.items() if (found := student.target(gap.before, ids)) is not None}
    if not targets:
        return {}
    sums = _sums(student, {index: gaps[index] for index in targets}, targets, windows)
    return {index: (targets[index], sums.pop(index).solved(RIDGE).float() / targets[index].factor) for index in targets}


def _sums(student: Student, gaps: dict[int, _Gap], targets: dict[int, Target], windows: list[np.ndarray]) -> dict[int, Sums]:
    """For each gap what enters the matrix before it now, and what is missing behind it; a token weighs 1 / its squared length."""
    blocks, sums, seen = student.blocks, dict[int, Sums](), dict[int, torch.Tensor]()

    def look(index: int, args: BlockArgs) -> None:
        seen[index] = args[0]

    with ExitStack() as stack:
        for index, target in targets.items():
            hook = target.matrix.register_forward_pre_hook(lambda _, args, index=index: look(index, args))
            stack.callback(hook.remove)
        for ids, real in batches(blocks.model, windows):
            with student.whole():
                wanted = blocks.states(ids, sorted({gap.target for gap in gaps.values()}))
            with blocks.without(student.removed):
                leaving = blocks.states(ids, sorted({gap.before + 1 for gap in gaps.values()}))
            for index, gap in gaps.items():
                state = wanted[gap.target][real].float()
                entering = seen[index].reshape(*real.shape, -1)[real].float()
                matrix = targets[index].matrix
                assert isinstance(matrix, torch.nn.Linear | Conv1D)
                # float32: those of all candidates are in memory together
                ours = sums.setdefault(index, Sums.empty(inputs_of(matrix), state.shape[1], torch.float32))
                weights = 1 / state.norm(dim=-1, keepdim=True).clamp_min(1e-6)
                ours.add(entering, state - leaving[gap.before + 1][real].float(), weights)
    return sums


def removals(
    blocks: Blocks, amount: int, first: np.ndarray, judging: list[np.ndarray], fitting: list[np.ndarray], shortlist: int
) -> Generator[tuple[list[int], int, dict[int, float], float]]:
    """One removal after another: the blocks gone so far, the new one, the KL of each candidate in nats a token, and the seconds.

    While the caller looks at a set, the model is healed for it; it is put back when the generator ends or is closed. first: Block
    Influence of the whole model. judging, fitting: windows that trials are measured on, and that changes are solved on.
    """
    student, original = Student(blocks), _final_states(blocks, judging)
    try:
        for count in range(amount):
            begun, influence = time.monotonic(), first
            if student.removed:
                with blocks.without(student.removed):
                    influence = measure_influence(blocks, judging).block_influence
            rest = [index for index in np.argsort(influence, kind="stable").tolist() if index not in student.removed]
            candidates = sorted(rest[:shortlist])
            found = changes(student, candidates, fitting)
            costs = _costs(student, candidates, found, judging, original, f"layer {count + 1} of {amount}")
            best = min(candidates, key=lambda index: costs[index])
            if best in found:
                student.change(*found[best])
            student.removed = sorted([*student.removed, best])
            yield student.removed, best, costs, time.monotonic() - begun
    finally:
        student.restore()


def _final_states(blocks: Blocks, windows: list[np.ndarray]) -> list[torch.Tensor]:
    """What leaves the last block, a batch at a time: (batch, tokens, hidden)."""
    last = len(blocks)
    return [blocks.states(ids, [last])[last] for ids, _ in batches(blocks.model, windows)]


def _costs(
    student: Student,
    candidates: list[int],
    found: dict[int, tuple[Target, torch.Tensor]],
    windows: list[np.ndarray],
    original: list[torch.Tensor],
    label: str,
) -> dict[int, float]:
    """Mean KL(original || without the candidate, healed), in nats a token; a trial starts before the block that changes."""
    blocks, last, sums, tokens = student.blocks, len(student.blocks), dict.fromkeys(candidates, 0.0), 0
    starts = {index: max(student.gap(index).before, 0) for index in candidates}
    parts = batches(blocks.model, windows)
    with bar(label, len(parts) * len(candidates), "trial") as shown:
        for (ids, real), wanted in zip(parts, original, strict=True):
            with blocks.without(student.removed):
                states = blocks.states(ids, sorted(set(starts.values())))
            leaving = []
            for index in candidates:
                start = starts[index]
                with (
                    student.changed(*found.get(index, (None, None))),
                    blocks.entering(start, states[start]),
                    blocks.without([*student.removed, index]),
                ):
                    leaving.append(blocks.states(ids, [last])[last][real])
                shown.update()
            for index, divergence in zip(candidates, divergences_of(blocks, wanted[real], leaving), strict=True):
                sums[index] += float(divergence.double().sum())
            tokens += int(real.sum())
    return {index: total / tokens for index, total in sums.items()}
