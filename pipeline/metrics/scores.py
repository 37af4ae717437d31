"""Quality of a model in numpy: losses of the true tokens, and KL divergence and top-1 agreement with the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from edgepress.pipeline.machine import cores, rows_in_cache

_THREADS = 8  # at most: each has four arrays of 2 MB


class _Losses(TypedDict):
    perplexity: float
    tokens: int


class QualityFigures(_Losses, total=False):
    """Figures of one model over all scored tokens; the optional ones need an original.

    perplexity: exp of the mean loss. tokens: how many were scored. kl_mean, kl_p99: mean and 99th percentile of
    KL(original || model), nats a token. kl_standard_error: of the mean, as of tokens that do not depend on each other.
    top1_agreement: share of positions with the same most likely token.
    """

    kl_mean: float
    kl_p99: float
    kl_standard_error: float
    top1_agreement: float


@dataclass
class Quality:
    """Per-token samples of one model over the windows, in order.

    losses: nats of the true next token. divergences: KL(original || model) in nats. agreements: same top-1 token. changes: of the
    loss, against the original's. The last three stay empty without an original.
    """

    losses: list[np.ndarray] = field(default_factory=list)
    divergences: list[np.ndarray] = field(default_factory=list)
    agreements: list[np.ndarray] = field(default_factory=list)
    changes: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: np.ndarray, logits: np.ndarray, original: np.ndarray | None) -> None:
        """Score one window: ids (tokens,), logits (tokens, vocabulary) of the model and of the original, float32."""
        self.add_part(ids[1:], logits, original)

    def add_part(self, following: np.ndarray, logits: np.ndarray, original: np.ndarray | None) -> None:
        """Score positions by the ids that follow them; what the last position of a window gives has none and is left out."""
        shares = np.array_split(np.arange(len(following)), min(len(following), _THREADS, cores()) or 1)

        def scored(share: np.ndarray) -> list[tuple[np.ndarray, ...]]:
            rows = slice(share[0], share[-1] + 1) if len(share) else slice(0)
            return list(_scored(following[rows], logits[rows], None if original is None else original[rows]))

        with ThreadPoolExecutor(len(shares)) as threads:  # numpy lets others run meanwhile
            for losses, *others in (part for parts in threads.map(scored, shares) for part in parts):
                self.losses.append(losses)
                for samples, found in zip((self.divergences, self.changes, self.agreements), others, strict=bool(others)):
                    samples.append(found)

    def figures(self) -> QualityFigures:
        """Means over all tokens scored so far, as plain numbers."""
        losses = np.concatenate(self.losses)
        figures = QualityFigures(perplexity=float(np.exp(losses.mean())), tokens=int(losses.size))
        if self.divergences:
            divergences = np.concatenate(self.divergences)
            figures["kl_mean"] = float(np.maximum(divergences.mean(), 0.0))  # not max, which takes 0 of it and NaN
            figures["kl_p99"] = float(np.percentile(divergences, 99))
            figures["kl_standard_error"] = standard_error(divergences)
            figures["top1_agreement"] = float(np.concatenate(self.agreements).mean())
        return figures

    def loss_change(self) -> tuple[float, float]:
        """Mean change of the loss against the original's, nats a token, and its standard error."""
        changes = np.concatenate(self.changes)
        return float(changes.mean()), standard_error(changes)


class _Softmax:
    """Of logits (positions, vocabulary): less the largest of their position, the exponentials, and the sums of these in float64.

    Exponentials in float32 are right to 1e-7 of themselves; in float64 they take six times as long where a processor has no vector
    instructions for them. The large arrays are used again: new ones would be new pages each time.
    """

    def __init__(self, positions: int, vocabulary: int) -> None:
        self._made = np.empty((2, positions, vocabulary), np.float32)

    def read(self, logits: np.ndarray) -> None:
        """For at most so many positions."""
        self._logits, self._largest = logits, logits.max(-1)
        self.shifted, self.exponentials = self._made[:, : len(logits)]
        np.subtract(logits, self._largest[:, None], out=self.shifted)
        np.exp(self.shifted, out=self.exponentials)
        self.sums: np.ndarray = self.exponentials.sum(-1, dtype=np.float64)

    def losses(self, ids: np.ndarray) -> np.ndarray:
        """Nats of the id that truly follows each position."""
        of_true = self._logits[np.arange(len(ids)), ids]
        losses: np.ndarray = np.log(self.sums) + self._largest.astype(np.float64) - of_true
        return losses


def _scored(true: np.ndarray, logits: np.ndarray, original: np.ndarray | None) -> Iterator[tuple[np.ndarray, ...]]:
    """Losses of the true ids (positions,); with the original's logits divergences, changes of the loss and agreements, too.

    Some positions at a time.
    """
    shape = min(len(true), rows_in_cache(logits.shape[-1])) or 1, logits.shape[-1]
    model, reference = _Softmax(*shape), None if original is None else _Softmax(*shape)
    for first in range(0, len(true), shape[0]):
        part = slice(first, first + shape[0])
        model.read(logits[part])
        losses = model.losses(true[part])
        if original is None or reference is None:
            yield (losses,)
            continue
        reference.read(original[part])
        agreements = reference.shifted.argmax(-1) == model.shifted.argmax(-1)
        differences = np.subtract(reference.shifted, model.shifted, out=model.shifted)
        # log p - log q is this much more than the difference of what was shifted: p (log p - log q) is summed without logarithms
        more = np.log(model.sums) - np.log(reference.sums)
        products = np.einsum("pv,pv->p", reference.exponentials, differences, dtype=np.float64)
        yield losses, products / reference.sums + more, losses - reference.losses(true[part]), agreements


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values that do not depend on each other."""
    return float(values.std() / np.sqrt(len(values)))


def mean_loss_of(windows: Iterable[np.ndarray], logits: Iterable[np.ndarray]) -> float:
    """Mean loss in nats of every token after the first of its window: ids (tokens,), logits (tokens, vocabulary) of each."""
    scores = Quality()
    for ids, rows in zip(windows, logits, strict=True):
        scores.add(ids, rows, None)
    return float(np.concatenate(scores.losses).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, float64, over the last axis."""
    shifted = np.subtract(logits, logits.max(-1, keepdims=True), dtype=np.float64)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
