"""How much each decoder block changes the residual stream: Block Influence and angular distance, over real tokens only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks, block_input, block_output
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
        found: np.ndarray = self.changes.sum(0) / self.tokens.sum()
        return found

    def angular_distance(self, length: int) -> np.ndarray:
        """Distance arccos(cos(x_i, x_i+n)) / pi across each run of ``length`` blocks, (runs,).

        Gromov et al. 2024, section 3.2, equation 7; the mean of all tokens where the paper takes the last of each sequence, of
        which a calibration text for a laptop has too few.
        """
        found: np.ndarray = self.angles[length].sum(0) / self.tokens.sum()
        return found

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
    no real token sees it, and padding is not counted. Blocks that ``blocks.without`` leaves out have influence 0.
    Raises ModelError that names the first block whose output is not finite.
    """
    changes, angles = [], {length: [] for length in lengths}  # type: ignore[var-annotated]
    real = torch.empty(0)
    batch: np.ndarray = np.zeros(0)
    states: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=max(lengths, default=0) + 1)
    turned: dict[int, np.ndarray] = {}

    def entering(index: int, hidden: torch.Tensor) -> None:
        states.append((hidden.float(), torch.linalg.vector_norm(hidden.float(), dim=-1)))
        for length in lengths:
            if index >= length:
                angle = torch.arccos(_cosine(*states[-1 - length], *states[-1]).clamp(-1, 1)) / torch.pi
                turned[length][:, index - length] = _sums(angle)

    def _sums(values: torch.Tensor) -> np.ndarray:
        return values.masked_fill(~real, 0).double().sum(1).numpy()

    def hook(index: int) -> Any:
        def measure(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if index == 0:
                states.clear()
                entering(0, block_input(args, kwargs))
            before = states[-1]
            entering(index + 1, block_output(output))
            change = _sums(1 - _cosine(*before, *states[-1]))
            if not np.isfinite(change).all():
                raise ModelError(f"the output of layer {index} is not finite (NaN or Inf); the checkpoint is broken there")
            batch[:, index] = change

        return measure

    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks.modules)]
    try:
        for ids, real in progress(batches(blocks.model, windows), "block influence", "batch"):  # noqa: B007 (the hooks read it)
            batch = np.zeros((len(ids), len(blocks)))
            turned = {length: np.zeros((len(ids), len(blocks) - length + 1)) for length in lengths}
            blocks.logits(ids)
            changes.append(batch)
            for length in lengths:
                angles[length].append(turned[length])
    finally:
        for handle in handles:
            handle.remove()
    tokens = np.array([len(row) for row in windows])
    return Influence(np.concatenate(changes), {length: np.concatenate(rows) for length, rows in angles.items()}, tokens)


def _cosine(x: torch.Tensor, x_norm: torch.Tensor, y: torch.Tensor, y_norm: torch.Tensor) -> torch.Tensor:
    cosine: torch.Tensor = torch.linalg.vecdot(x, y) / (x_norm * y_norm).clamp_min(1e-30)  # a state of zeros has no direction
    return cosine
