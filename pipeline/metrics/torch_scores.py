"""Quality of a torch model on windows of token ids: logits, next-token losses, and KL divergence from other logits."""

from __future__ import annotations

import inspect
from itertools import groupby

import numpy as np
import torch
from edgepress.models.rotary import switches
from edgepress.pipeline.progress import progress
from edgepress.pipeline.text.windows import padded
from transformers import PreTrainedModel

_ROWS = 256  # positions whose probabilities are in memory at once
_LOGITS = 2**26  # float32 logits of a batch: a quarter of a gigabyte


def batches(model: PreTrainedModel, windows: list[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows in order as ids (batch, tokens), padded on the right, and which of them are real.

    At most 8 windows at a time, few enough for the logits of a large vocabulary to fit a small memory.
    """
    size = int(min(8, max(1, _LOGITS // (len(windows[0]) * model.config.vocab_size))))
    changes = switches(model.config)  # a row beside a longer one would be read with that one's rotary frequencies
    alike = [list(rows) for _, rows in groupby(windows, key=lambda row: sum(len(row) > length for length in changes))]
    return [(torch.from_numpy(ids), torch.from_numpy(real)) for rows in alike for ids, real in padded(rows, size)]


def logits_of(model: PreTrainedModel, ids: np.ndarray, keep: int = 0) -> np.ndarray:
    """Logits (kept, vocabulary) of the last ``keep`` positions of one window (tokens,), 0 for all, without a cache."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters  # saves the memory of the others
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(ids)[None], use_cache=False, **({"logits_to_keep": keep} if known else {}))
    logits: np.ndarray = output.logits[0, -keep:].float().numpy()
    return logits


def greedy_tokens(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[int]:
    """Plain greedy continuation of ids (tokens,) with the cache: no penalty or stop token of a generation config interferes."""
    tokens: list[int] = []
    new, past = torch.from_numpy(ids)[None], None
    with torch.inference_mode():
        for _ in range(count):
            if len(ids) + len(tokens) - 1 in switches(model.config):  # keys in the cache have other frequencies
                new, past = torch.tensor([[*ids.tolist(), *tokens]]), None
            output = model(input_ids=new, past_key_values=past, use_cache=True)
            past = output.past_key_values
            new = output.logits[:, -1:].argmax(-1)
            tokens.append(int(new))
    return tokens


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats, float32 (batch, tokens - 1), of every id after the first of its window."""
    losses = torch.empty(ids.shape[0], ids.shape[1] - 1)
    for row in range(len(ids)):
        for first in range(0, losses.shape[1], _ROWS):
            rows = slice(first, min(first + _ROWS, losses.shape[1]))
            losses[row, rows] = torch.nn.functional.cross_entropy(logits[row, rows].float(), ids[row, 1:][rows], reduction="none")
    return losses


def divergences(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(original || model) in nats, float32 (positions,), of logits (positions, vocabulary)."""
    rows = []
    for first in range(0, len(logits), _ROWS):
        reference, scores = (torch.log_softmax(part[first : first + _ROWS].float(), -1) for part in (original, logits))
        rows.append((reference.exp() * (reference - scores)).sum(-1))
    return torch.cat(rows)


def mean_loss(model: PreTrainedModel, windows: list[np.ndarray]) -> float:
    """Mean loss in nats over every token after the first of its window."""
    nats, scored = 0.0, 0
    with torch.inference_mode():
        for ids, real in progress(batches(model, windows), "loss", "batch"):
            scoring = real[:, 1:]
            losses = next_token_losses(model(input_ids=ids, use_cache=False).logits, ids)
            nats, scored = nats + float(losses[scoring].double().sum()), scored + int(scoring.sum())
    return nats / scored


def perplexity(loss: float) -> float:
    """exp(loss) as a number that JSON can hold: four decimals, 1e300 for NaN and overflow."""
    return round(float(np.exp(loss)), 4) if loss < 690 else 1e300
