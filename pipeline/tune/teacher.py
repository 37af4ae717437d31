"""The original's predictions, computed once: the likeliest tokens of every position and what is left for the others.

So original and student are never in memory together, and an interrupted run need not ask the original again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress
from transformers import PreTrainedModel

TOP = 128
_ROWS = 256  # positions whose probabilities are in memory at once
_LOGITS = 2**24  # of a batch: a large vocabulary is most of the memory that training takes
_LOGITS_ON_A_GPU = 2**26
_LEAST = 1e-6  # of the probability of all other tokens: float32 cannot tell less from nothing


@dataclass(frozen=True)
class Predictions:
    """The original's ``TOP`` likeliest tokens at every position of some windows, in order.

    tokens: int32 (positions, top). logs: their log probabilities, float32 (positions, top). Mapped from files.
    """

    tokens: np.ndarray
    logs: np.ndarray

    def at(self, rows: slice | np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (int64) and logs of some positions."""
        tokens, logs = np.array(self.tokens[rows], dtype=np.int64), np.array(self.logs[rows])
        return torch.from_numpy(tokens).to(device), torch.from_numpy(logs).to(device)


def small_batches(model: PreTrainedModel, windows: list[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As ``batches``, ids (batch, tokens) and which are real, where the model is: at most ``_LOGITS`` logits, or one window."""
    logits = _LOGITS_ON_A_GPU if model.device.type == "cuda" else _LOGITS
    size = max(1, logits // (len(windows[0]) * model.config.get_text_config().vocab_size))
    parts = (windows[first : first + size] for first in range(0, len(windows), size))
    return [(ids.to(model.device), real.to(model.device)) for part in parts for ids, real in batches(model, part)]


def record(teacher: PreTrainedModel, windows: list[np.ndarray], stem: Path) -> Predictions:
    """Run the original over the windows into ``stem`` with a suffix, 8 * TOP bytes a position; whole files are kept as they are."""
    shape = (sum(map(len, windows)), min(TOP, teacher.config.get_text_config().vocab_size))
    files = stem.with_suffix(".tokens"), stem.with_suffix(".logs")
    if not all(file.is_file() for file in files):
        parts = [file.with_suffix(file.suffix + ".part") for file in files]
        _record(
            teacher, windows, np.memmap(parts[0], np.int32, "w+", shape=shape), np.memmap(parts[1], np.float32, "w+", shape=shape)
        )
        for part, file in zip(parts, files, strict=True):
            part.replace(file)
    return Predictions(np.memmap(files[0], np.int32, "r", shape=shape), np.memmap(files[1], np.float32, "r", shape=shape))


def _record(teacher: PreTrainedModel, windows: list[np.ndarray], tokens: np.ndarray, logs: np.ndarray) -> None:
    row, top = 0, tokens.shape[1]
    with torch.inference_mode():
        for ids, real in progress(small_batches(teacher, windows), "the original's predictions", "batch"):
            logits = teacher(input_ids=ids, use_cache=False).logits[real]
            for first in range(0, len(logits), _ROWS):
                part = torch.log_softmax(logits[first : first + _ROWS].float(), -1)
                best, index = part.topk(top, sorted=False)
                tokens[row : row + len(part)], logs[row : row + len(part)] = index.cpu().numpy(), best.cpu().numpy()
                row += len(part)


def divergence(logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL(original || student) a position in nats, (positions,), with all tokens outside the original's likeliest as one.

    logits: (positions, vocabulary) of the student. tokens, logs: (positions, top) as in Predictions. Merging outcomes never
    makes a divergence greater, so this is a lower bound, and close: what is merged has little probability.
    """
    found: torch.Tensor = _Divergence.apply(logits, tokens, logs)
    return found


class _Divergence(torch.autograd.Function):
    """``divergence`` with its gradient in closed form: one exponential a logit, and no float32 copy of all the logits.

    With q the student's probabilities, p the original's, and r and s what p and q leave for the merged tokens, the derivative
    with respect to a logit is q - p for a token that the original's list names, and q * (1 - r / s) for every other.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        ctx.gradient = torch.empty_like(logits) if wanted else None
        values = torch.empty(len(logits), device=logits.device)
        for first in range(0, len(logits), _ROWS):
            rows = slice(first, first + _ROWS)
            values[rows], gradient = _divergence(logits[rows].float(), tokens[rows], logs[rows], wanted)
            if wanted:
                ctx.gradient[rows] = gradient
        return values

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient.mul_(upstream[:, None]), None, None


def _divergence(
    logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergence (positions,), and if ``wanted`` its derivative by the float32 logits (positions, vocabulary)."""
    logits = logits - logits.amax(-1, keepdim=True)
    best = logits.gather(-1, tokens)
    powers = logits.exp_()
    total = powers.sum(-1, keepdim=True)
    scores, probabilities = best - total.log(), logs.exp()
    rest = (1 - probabilities.sum(-1)).clamp_min(_LEAST)
    student_rest = (1 - scores.exp().sum(-1)).clamp_min(_LEAST)
    value = (probabilities * (logs - scores)).sum(-1) + rest * (rest.log() - student_rest.log())
    if not wanted:
        return value, None
    others = powers.mul_((1 - rest / student_rest)[:, None] / total)
    return value, others.scatter_(-1, tokens, scores.exp() - probabilities)


def mean_divergence(student: PreTrainedModel, windows: list[np.ndarray], predictions: Predictions) -> float:
    """The mean of ``divergence`` over the windows' positions, in nats a token."""
    total, row = 0.0, 0
    with torch.inference_mode():
        for ids, real in progress(small_batches(student, windows), "KL", "batch"):
            logits = student(input_ids=ids, use_cache=False).logits[real]
            for first in range(0, len(logits), _ROWS):
                part = logits[first : first + _ROWS]
                rows = slice(row, row + len(part))
                tokens, logs = predictions.at(rows, part.device)
                total += float(divergence(part, tokens, logs).double().sum())
                row += len(part)
    return total / row
