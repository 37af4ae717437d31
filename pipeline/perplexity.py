"""Quality of a model on given token ids: losses, and how far its distribution is from the original's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Logits = Callable[[np.ndarray], np.ndarray]


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats, float32 (batch * (tokens - 1),), of every id after the first of its window."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


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
        """Score one window: ids (tokens,), logits (tokens, vocabulary) of the model and of the original."""
        scores = torch.from_numpy(logits[:-1]).float().log_softmax(-1)
        self.losses.append((-scores.gather(1, torch.from_numpy(ids[1:, None])))[:, 0].numpy())
        if original is not None:
            truth = torch.from_numpy(original[:-1]).float().log_softmax(-1)
            self.divergences.append((truth.exp() * (truth - scores)).sum(-1).numpy())
            self.agreements.append((truth.argmax(-1) == scores.argmax(-1)).numpy())

    def figures(self, text_bytes: int | None = None) -> dict[str, Any]:
        """Perplexity and the rest as plain numbers; ``text_bytes``: UTF-8 bytes of the scored text, for bits per byte."""
        losses = np.concatenate(self.losses).astype(np.float64)
        found: dict[str, Any] = {"perplexity": float(np.exp(losses.mean())), "tokens": int(losses.size)}
        if text_bytes:
            found["bits_per_byte"] = float(losses.sum() / np.log(2) / text_bytes)
        if self.divergences:
            divergences = np.concatenate(self.divergences).astype(np.float64)
            found["kl_mean"] = float(divergences.mean())
            found["kl_p99"] = float(np.percentile(divergences, 99))
            found["top1_agreement"] = float(np.concatenate(self.agreements).mean())
        return found
