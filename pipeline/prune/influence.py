"""How much each decoder block changes the residual stream: Block Influence and angular distance, over real tokens only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, Blocks, block_input, block_output
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress


@dataclass(frozen=True)
class Influence:
    """Sums over the real tokens of each window, so that means over any part of the text follow.

    changes: (windows, blocks), of 1 - cos(x_i, x_i+1). angles: n -> (windows, blocks - n + 1), of the angular distance
    between the inputs of blocks i and i + n. tokens: (windows,).
    """

    changes: np.ndarray
    angles: dict[int, np.ndarray]
    tokens: np.ndarray

    @property
    def block_influence(self) -> np.ndarray:
        """BI_i = 1 - E[cos(x_i, x_i+1)], (blocks,), x_i the residual stream before block i (ShortGPT, section 3, equation 1)."""
        means: np.ndarray = self.changes.sum(0) / self.tokens.sum()
        return means

    def angular_distance(self, length: int) -> np.ndarray:
        """Distance arccos(cos(x_i, x_i+n)) / pi across each run of ``length`` blocks, (runs,).

        Gromov et al. 2024, section 3.2, equation 7, averaged over all tokens; the paper takes the last of each sequence, and a
        calibration text for a laptop has too few of those.
        """
        means: np.ndarray = self.angles[length].sum(0) / self.tokens.sum()
        return means

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Block Influence over the even and over the odd windows, (blocks,) each; of two windows or more."""
        even, odd = (self.changes[part::2].sum(0) / self.tokens[part::2].sum() for part in (0, 1))
        return even, odd

    def stability(self) -> float | None:
        """Spearman's rank correlation of Block Influence between the even and the odd windows; None with one window or block."""
        if len(self.tokens) < 2 or self.changes.shape[1] < 2:
            return None
        even, odd = (np.argsort(np.argsort(half)) for half in self.halves())
        return round(float(np.corrcoef(even, odd)[0, 1]), 4)


def measure_influence(blocks: Blocks, windows: list[np.ndarray], lengths: Sequence[int] = ()) -> Influence:
    """Block Influence of every block, and angular distances of the runs of the given ``lengths``, over windows of token ids.

    Taken by hooks on the blocks themselves (the last hidden state that transformers returns has passed the final norm,
    which would falsify the last block), streaming, in float32. Windows of unequal length are padded on the right, where
    no real token sees it, and padding is not counted. Blocks skipped by ``blocks.without`` have influence 0.
    Raises ModelError that names the first block whose output is not finite.
    """
    meter = _Meter(len(blocks), lengths)
    handles = [block.register_forward_hook(meter.hook(i), with_kwargs=True) for i, block in enumerate(blocks.modules)]
    try:
        for ids, real in progress(batches(blocks.model, windows), "block influence", "batch"):
            meter.begin(real)
            blocks.states(ids, [len(blocks)])  # no head: a fifth of the work of a small model, and its logits are the largest array
    finally:
        for handle in handles:
            handle.remove()
    tokens = np.array([len(row) for row in windows])
    angles = {length: np.concatenate(sums) for length, sums in meter.angles.items()}
    return Influence(np.concatenate(meter.changes), angles, tokens)


class _Meter:
    """The sums of Influence, batch by batch.

    changes: an array (batch, blocks) a batch. angles: length -> an array (batch, blocks - length + 1) a batch.
    """

    def __init__(self, count: int, lengths: Sequence[int]) -> None:
        self.count = count
        self.changes: list[np.ndarray] = []
        self.angles: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
        self._real = torch.empty(0)
        # The latest states and their norms, as many as the longest run needs.
        self._states: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=max(lengths, default=0) + 1)

    def begin(self, real: torch.Tensor) -> None:
        """A new batch; real: which positions are tokens, not padding, bool (batch, tokens)."""
        self._real = real
        self.changes.append(np.zeros((len(real), self.count)))
        for length, sums in self.angles.items():
            sums.append(np.zeros((len(real), self.count - length + 1)))

    def hook(self, index: int) -> Callable[[torch.nn.Module, BlockArgs, dict[str, object], BlockOutput], None]:
        """For block ``index``, called with its output."""

        def measure(module: torch.nn.Module, args: BlockArgs, kwargs: dict[str, object], output: BlockOutput) -> None:
            if index == 0:
                self._states.clear()
                self._enter(0, block_input(args, kwargs))
            (before, before_norm) = self._states[-1]
            self._enter(index + 1, block_output(output))
            after, after_norm = self._states[-1]
            change = self._sums(1 - cosine(before, after, before_norm, after_norm))
            self.changes[-1][:, index] = check_finite(change, index)

        return measure

    def _enter(self, index: int, hidden: torch.Tensor) -> None:
        """Take what enters block ``index``, and the angles of the runs that end before it."""
        self._states.append((hidden.float(), torch.linalg.vector_norm(hidden.float(), dim=-1)))
        for length, sums in self.angles.items():
            if index >= length:
                (first, first_norm), (last, last_norm) = self._states[-1 - length], self._states[-1]
                angle = torch.arccos(cosine(first, last, first_norm, last_norm).clamp(-1, 1))
                sums[-1][:, index - length] = self._sums(angle / torch.pi)

    def _sums(self, values: torch.Tensor) -> np.ndarray:
        """Over the real tokens of each window, float64 (batch,)."""
        return values.masked_fill(~self._real, 0).double().sum(1).numpy()


def check_finite(change: np.ndarray, index: int) -> np.ndarray:
    """What layer ``index`` changes, as it is. Raises ModelError where that is no number."""
    if not np.isfinite(change).all():
        raise ModelError(f"the output of layer {index} is not finite (NaN or Inf); the checkpoint is broken there")
    return change


def cosine(
    x: torch.Tensor, y: torch.Tensor, x_norm: torch.Tensor | None = None, y_norm: torch.Tensor | None = None
) -> torch.Tensor:
    """Of states (..., hidden), whose norms may be known; a state of zeros has no direction, and 0."""
    x_norm = torch.linalg.vector_norm(x, dim=-1) if x_norm is None else x_norm
    y_norm = torch.linalg.vector_norm(y, dim=-1) if y_norm is None else y_norm
    found: torch.Tensor = torch.linalg.vecdot(x, y) / (x_norm * y_norm).clamp_min(1e-30)
    return found
