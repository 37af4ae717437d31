"""Quality of a torch model on windows of token ids: logits, next-token losses, and KL divergence from other logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

import numpy as np
import torch
from edgepress.models.rotary import switches
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.weight_file import weight_file
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.machine import rows_in_cache
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.progress import progress
from edgepress.pipeline.text.windows import padded
from transformers import PreTrainedModel

# A batch of windows has positions for so many logits, which are never made all at once.
_LOGITS = 2**26
_READ_FOR = 4096  # positions that a computer takes far longer to compute than to read a block's weights for
LIKELY = 0.01  # probability of tokens that are told where a model answers


def batches(
    model: PreTrainedModel, windows: list[np.ndarray], tokens: int | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows in order as ids (batch, tokens), padded on the right, and which of them are real.

    At most 8 windows at a time, fewer where the vocabulary is large, or as many as have ``tokens`` positions; more of a model whose
    weights do not fit into memory, which are read for every batch.
    """
    most, positions = 8, tokens or _LOGITS // model.config.vocab_size
    if weight_file(model) is not None:
        most, positions = 64, max(positions, _READ_FOR)
    size = int(min(most, max(1, positions // len(windows[0]))))
    changes = switches(model.config)  # a row beside a longer one would be read with that one's rotary frequencies
    alike = [list(rows) for _, rows in groupby(windows, key=lambda row: sum(len(row) > length for length in changes))]
    return [(torch.from_numpy(ids), torch.from_numpy(real)) for rows in alike for ids, real in padded(rows, size)]


def logits_of(model: PreTrainedModel, ids: np.ndarray, keep: int = 0) -> np.ndarray:
    """Logits (kept, vocabulary) of the last ``keep`` positions of one window (tokens,), 0 for all, without a cache."""
    device = "cpu" if model.device.type == "meta" else model.device  # meta: its weights are read as they are needed
    with torch.inference_mode():
        row = torch.from_numpy(ids)[None].to(device)
        output = model(input_ids=row, use_cache=False, **_keeping(model, keep))
    logits: np.ndarray = output.logits[0, -keep:].float().cpu().numpy()
    return logits


def _keeping(model: PreTrainedModel, last: int) -> dict[str, int]:
    """What has a model make the logits of the last positions alone, 0 for all: nothing where it cannot."""
    return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def greedy_tokens(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[int]:
    """Plain greedy continuation of ids (tokens,) with the cache: no penalty or stop token of a generation config interferes."""
    (tokens,) = greedy_rows(model, ids[None], count)
    return tokens


def greedy_rows(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[list[int]]:
    """The same of several rows (rows, tokens) at a time: the weights are read once for all."""
    return [[next(iter(chances)) for chances in row] for row in _greedy(model, ids, count)]


def greedy_chances(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[dict[int, float]]:
    """As ``greedy_tokens``; for each its probability, first, and those of all others that were ``LIKELY`` there."""
    (row,) = _greedy(model, ids[None], count)
    return row


def _greedy(model: PreTrainedModel, ids: np.ndarray, count: int) -> list[list[dict[int, float]]]:
    """``greedy_chances`` of each row of ids (rows, tokens)."""
    found: list[list[dict[int, float]]] = [[] for _ in ids]
    new, past = torch.from_numpy(ids), None
    with torch.inference_mode():
        for place in range(count):
            if ids.shape[1] + place - 1 in switches(model.config):  # keys in the cache have other frequencies
                rows = [[*row.tolist(), *(next(iter(chances)) for chances in taken)] for row, taken in zip(ids, found, strict=True)]
                new, past = torch.tensor(rows), None
            output = model(input_ids=new, past_key_values=past, use_cache=True, **_keeping(model, 1))
            past = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float(), -1)
            new = output.logits[:, -1].argmax(-1, keepdim=True)
            for row, all_chances, token in zip(found, chances, new[:, 0].tolist(), strict=True):
                likely = torch.nonzero(all_chances >= LIKELY)[:, 0].tolist()
                row.append({one: float(all_chances[one]) for one in dict.fromkeys([token, *likely])})
    return found


class Logits:
    """Logits of a torch model by rows, made from what leaves its last block; whole windows where its blocks cannot be told."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._blocks = model, None
        with suppress(ModelError):
            self._blocks = Blocks(model)

    def recorded(self, windows: list[np.ndarray]) -> Iterator[torch.Tensor]:
        """What the logits of each window (tokens,) are made from: the states (tokens, hidden) that leave the last block, or ids."""
        if self._blocks is None:
            yield from map(torch.from_numpy, windows)
            return
        last = len(self._blocks)
        for ids, real in batches(self._model, windows):
            for states, keep in zip(self._blocks.states(ids, [last])[last], real, strict=True):
                yield states[keep]

    def drop_blocks(self) -> None:
        """Free what only ``recorded`` needs."""
        if self._blocks is not None:
            self._blocks.drop()

    def parts(self, recorded: torch.Tensor, begin: int = 0, end: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Logits float32 of the positions ``begin`` to ``end`` (default: all): which positions, and (positions, vocabulary)."""
        end = len(recorded) if end is None else min(end, len(recorded))
        if self._blocks is None:
            yield slice(begin, end), logits_of(self._model, recorded.numpy())[begin:end]
            return
        for positions, logits in self._blocks.heads(recorded[begin:end]):
            yield slice(begin + positions.start, begin + positions.stop), logits.numpy()
            del logits


def next_token_losses(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats, float32 (positions,), of the true next ids; logits (positions, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits.float(), following, reduction="none")


def divergences(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(original || model) in nats, float32 (positions,), of logits (positions, vocabulary)."""
    return _divergences(torch.log_softmax(original.float(), -1), logits)


def _divergences(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The same of the original's log-probabilities. In place: every array here is as large as the logits."""
    scores = torch.log_softmax(logits.float(), -1)
    return torch.sub(reference, scores, out=scores).mul_(reference.exp()).sum(-1)


def exact_losses(blocks: Blocks, windows: list[np.ndarray], label: str) -> np.ndarray:
    """Loss in nats of every token after the first of its window, float64 (tokens,), summed in float64 as Quality has it.

    label: of the progress bar.
    """
    scores, last = Quality(), len(blocks)
    for ids, real in progress(batches(blocks.model, windows), label, "batch"):
        for row, states, keep in zip(ids, blocks.states(ids, [last])[last], real, strict=True):
            following = row[keep][1:].numpy()
            for positions, logits in blocks.heads(states[keep][:-1]):
                scores.add_part(following[positions], logits.numpy(), None)
                del logits
    return np.concatenate(scores.losses)


def losses(blocks: Blocks, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Losses (tokens - 1,) of one sequence of ids (tokens,) from the states (tokens, hidden) that leave the last block."""
    parts = list[torch.Tensor]()
    for positions, logits in blocks.heads(hidden[:-1]):
        few = in_cache(logits)
        parts += map(next_token_losses, few, ids[1:][positions].split(len(few[0])))
        del logits, few
    return torch.cat(parts)


@torch.inference_mode()
def divergences_of(blocks: Blocks, original: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
    """KL(original || other) of each of ``others``, float32 (tokens,), from states (tokens, hidden) that leave the last block."""
    parts: list[list[torch.Tensor]] = [[] for _ in others]
    for positions, logits in blocks.heads(original):
        references = in_cache(logits.float())
        for few in references:
            few.copy_(torch.log_softmax(few, -1))
        for found, hidden in zip(parts, others, strict=True):
            (_, scores), *_ = blocks.heads(hidden[positions])
            found += [_divergences(reference, few) for reference, few in zip(references, in_cache(scores), strict=True)]
            del scores
        del logits, references, few
    return [torch.cat(found) for found in parts]


def in_cache(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits (positions, vocabulary) by some positions at a time, so many for each thread."""
    parts: tuple[torch.Tensor, ...] = logits.split(rows_in_cache(logits.shape[-1]) * torch.get_num_threads())
    return parts


def mean_loss(model: PreTrainedModel | Blocks, windows: list[np.ndarray]) -> float:
    """Mean loss in nats over every token after the first of its window."""
    blocks = model if isinstance(model, Blocks) else Blocks(model)
    nats, scored = 0.0, 0
    with torch.inference_mode():
        for ids, real in progress(batches(blocks.model, windows), "loss", "batch"):
            hidden = blocks.states(ids, [len(blocks)])[len(blocks)]
            found = torch.cat(
                [losses(blocks, row[keep], states[keep]) for row, states, keep in zip(ids, hidden, real, strict=True)]
            )
            nats, scored = nats + float(found.double().sum()), scored + len(found)
    return nats / scored


def perplexity(loss: float) -> float:
    """exp(loss) as a number that JSON can hold: four decimals, 1e300 for NaN and overflow."""
    return round(float(np.exp(loss)), 4) if loss < 690 else 1e300
