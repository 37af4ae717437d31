"""Quality of a model on given token ids: losses, and how far its distribution is from the original's. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_ROWS = 64  # positions at a time: float64 copies of whole windows of a large vocabulary would need gigabytes


@dataclass
class Quality:
    """Per-token samples of one model over the windows, in order.

    losses: nats of the true next token. divergences: KL(original || model) in nats. agreements: same top-1 token.
    The last two stay empty without an original.
    """

    losses: list[np.ndarray] = field(default_factory=list)
    divergences: list[np.ndarray] = field(default_factory=list)
    agreements: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: np.ndarray, logits: np.ndarray, original: np.ndarray | None) -> None:
        """Score one window: ids (tokens,), logits (tokens, vocabulary) of the model and of the original, summed in float64."""
        for first in range(0, len(ids) - 1, _ROWS):
            rows = slice(first, min(first + _ROWS, len(ids) - 1))
            scores, following = log_softmax(logits[rows]), ids[1:][rows]
            self.losses.append(-scores[np.arange(len(following)), following])
            if original is not None:
                truth = log_softmax(original[rows])
                self.divergences.append((np.exp(truth) * (truth - scores)).sum(-1))
                self.agreements.append(truth.argmax(-1) == scores.argmax(-1))

    def figures(self, text_bytes: int | None = None) -> dict[str, Any]:
        """Perplexity and the rest as plain numbers; ``text_bytes``: UTF-8 bytes of the scored text, for bits per byte."""
        losses = np.concatenate(self.losses)
        found: dict[str, Any] = {"perplexity": float(np.exp(losses.mean())), "tokens": int(losses.size)}
        if text_bytes:
            found["bits_per_byte"] = float(losses.sum() / np.log(2) / text_bytes)
        if self.divergences:
            divergences = np.concatenate(self.divergences)
            found["kl_mean"] = float(divergences.mean())
            found["kl_p99"] = float(np.percentile(divergences, 99))
            found["top1_agreement"] = float(np.concatenate(self.agreements).mean())
        return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
