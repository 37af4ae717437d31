"""A model writes: rows of token ids sampled at temperature 1, many rows at a time."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.forwards import by_onednn
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.machine import large_blocks_given_back, training_device
from edgepress.pipeline.own_text.openings import Openings
from edgepress.pipeline.progress import bar
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
# Tokens of a row: at its end all begin anew, for the cache grows with it. A short text has shorter ones, all written at a time.
LONGEST, SHORTEST = 512, 256
ROWS, ROWS_ON_A_GPU = 32, 256  # at a time: more are hardly faster on a CPU


def sample(checkpoint: Checkpoint, tokens: int, seed: int) -> np.ndarray:
    """``tokens`` ids, int64, as the model writes them; special tokens, prompts and all.

    A document begins with BOS or, every other one of a chat model, with a prompt in its chat template; where it ends the next
    begins, which sees nothing of it. Each row draws from a generator of its own. Raises ModelError for logits that are not finite.
    """
    if training_device().type == "cuda":
        try:
            return _sampled(checkpoint, tokens, seed, training_device())
        except torch.OutOfMemoryError:
            log.warning("warning: the GPU has too little memory for %s to write on; it writes on the CPU", checkpoint.path.name)
    return _sampled(checkpoint, tokens, seed, torch.device("cpu"))


def _sampled(checkpoint: Checkpoint, tokens: int, seed: int, device: torch.device) -> np.ndarray:
    openings = Openings.of(checkpoint)
    with large_blocks_given_back():  # each matrix in float32, when there is one in dtype()
        model = checkpoint.model().to(device, dtype(device))
    length = min(LONGEST, max(SHORTEST, math.ceil(tokens / ROWS)), checkpoint.context, tokens)
    rows = [_Row(openings, np.random.default_rng((seed, number)), number) for number in range(math.ceil(tokens / length))]
    log.info("calibration: %s writes %d tokens to calibrate on", checkpoint.path.name, tokens)
    parts, begun = [], time.monotonic()
    with bar("calibration text", length * len(rows), "token") as shown, by_onednn(model.modules()):
        at_once = ROWS_ON_A_GPU if model.device.type == "cuda" else ROWS
        for batch in np.array_split(np.array(rows, dtype=object), math.ceil(len(rows) / at_once)):
            parts += _written(model, list(batch), length, openings.known, shown.update)
            seconds, rest = time.monotonic() - begun, len(rows) / len(parts) - 1
            if shown.disable and seconds * rest > 10:  # the bar says it elsewhere
                log.info("calibration: about %.0f s more", seconds * rest)
    ids: np.ndarray = np.concatenate(parts)[:tokens]
    return ids


def dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor has it, and what is sampled differs by less than another seed's.

    A token of each row at a time is bound by memory, which half of the bytes relieve, even where large products are slower in it.
    """
    capable = torch.cpu.get_capabilities()
    native = capable.get("avx512_bf16") or capable.get("amx_bf16")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


class _Row:
    """One row of ids as it grows. begin: position of its present document's first token."""

    def __init__(self, openings: Openings, random: np.random.Generator, number: int) -> None:
        self._openings, self._random, self._documents = openings, random, number
        self.begin, self._ended = 0, False
        self._given = self._opening()

    def chance(self) -> float:
        """What the next id is drawn by, from 0 to 1; unused where the opening gives it."""
        return 0.0 if self._given else float(self._random.random())

    def next(self, position: int, token: int) -> int:
        """The id at ``position``: the opening's next, or ``token``, which was drawn."""
        if self._ended:
            self.begin, self._ended = position, False
        if self._given:
            return self._given.pop(0)
        if token in self._openings.ends:
            self._given, self._ended = self._opening(), True
            if self._given[0] == token:  # what ends a text begins the next
                self._given, self.begin, self._ended = self._given[1:], position, False
        return token

    def _opening(self) -> list[int]:
        self._documents += 1
        return list(self._openings.draw(self._documents, self._random))


def _written(
    model: PreTrainedModel, rows: list[_Row], length: int, known: int, advance: Callable[[int], object]
) -> list[np.ndarray]:
    """``length`` ids of each row. A document's past is masked as left padding is, and its positions count from its beginning."""
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    numbered = "position_ids" in inspect.signature(model.forward).parameters
    past, drawn = None, [0] * len(rows)
    for position in range(length):
        for number, row in enumerate(rows):
            ids[number, position] = row.next(position, drawn[number])
            mask[number, : row.begin] = 0
        mask[:, position] = 1
        advance(len(rows))
        if position + 1 == length:
            break
        places = {"position_ids": torch.tensor([[position - row.begin] for row in rows]).to(model.device)} if numbered else {}
        new, seen = ids[:, position : position + 1].to(model.device), mask[:, : position + 1].to(model.device)
        with torch.inference_mode():
            output = model(input_ids=new, attention_mask=seen, past_key_values=past, use_cache=True, **places)
            past = output.past_key_values
            sums = torch.softmax(output.logits[:, -1, :known].float(), -1).cumsum(-1)
        if not bool(torch.isfinite(sums[:, -1]).all()):
            raise ModelError("the model's logits are not finite (NaN or Inf), so it cannot write; the checkpoint is broken")
        chances = torch.tensor([[row.chance()] for row in rows]).to(model.device)
        drawn = by_chance(sums, chances)[:, 0].tolist()
    return list(ids.numpy())


def by_chance(sums: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """The ids (rows, draws) that chances from 0 to 1, (rows, draws), fall on; sums: of the probabilities, (rows, vocabulary)."""
    whole = sums[:, -1:].contiguous()
    likely = torch.searchsorted(sums, whole)  # the last id of any probability: a chance may be rounded up to 1
    return torch.minimum(torch.searchsorted(sums, chances * whole, right=True), likely)
