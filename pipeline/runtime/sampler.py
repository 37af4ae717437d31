"""The next token from its logits: the most likely one, or drawn from what transformers would draw from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from edgepress.pipeline.documents import shown
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json

GENERATION = "generation_config.json"
TOP_K = 50  # transformers', where a generation_config that samples does not give it
# Field of Sampling -> least and most that a model's generation_config may say.
_BOUNDS = {"temperature": (0, 100), "top_k": (0, 1 << 31), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the names are transformers' and OpenAI's.

    temperature: 0 takes the most likely token. top_k: only so many of the likeliest, 0 for all. top_p: only the likeliest that
    together have this probability. min_p: only those with this share of the likeliest one's. repetition_penalty: divides the
    positive logits of tokens that stand in the text, and multiplies the negative ones (Keskar et al. 2019, section 4.1).
    presence_penalty, frequency_penalty: taken from the logits of tokens generated so far, once and for each time. bias: token ->
    what is added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)


def own_sampling(folder: Path) -> Sampling:
    """How a model's generation_config.json wants its tokens drawn: the likeliest one each where it does not sample.

    Raises InputError for a value that cannot be.
    """
    file = folder / GENERATION
    content = read_json(file) if file.is_file() else {}
    given = {key: value for key in _BOUNDS if (value := content.get(key)) is not None}
    for key, value in given.items():
        low, high = _BOUNDS[key]
        if type(value) not in (int, float) or not low <= value <= high:
            raise InputError(f"{file}: {key} is {shown(value)}, it must be a number from {low} to {high}; correct it")
    if content.get("do_sample") is not True:
        return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
    return Sampling(**{"temperature": 1.0, "top_k": TOP_K} | given | {"top_k": int(given.get("top_k", TOP_K))})


def with_wishes(own: Sampling, wishes: object) -> Sampling:
    """``own`` where ``wishes``, which may have attributes of the same names, has None or none."""
    names = [item.name for item in dataclasses.fields(Sampling)]
    return dataclasses.replace(own, **{name: value for name in names if (value := getattr(wishes, name, None)) is not None})


class Sampler:
    """Chooses one token after another of one text.

    likeliest: how many alternatives are noted for each token; None notes nothing. noted: for each token chosen its natural
    logarithm of the probability under the model's own distribution, and those of the likeliest tokens.
    """

    def __init__(
        self, sampling: Sampling, random: np.random.Generator, ids: Iterable[int] = (), likeliest: int | None = None
    ) -> None:
        """ids: of the text so far."""
        self.sampling, self.likeliest = sampling, likeliest
        self.noted: list[tuple[float, dict[int, float]]] = []
        self._random = random
        self._text = set(ids) if sampling.repetition_penalty != 1 else set()
        self._new: Counter[int] = Counter()

    def __call__(self, logits: np.ndarray) -> int:
        """The token chosen by logits (vocabulary,)."""
        sampling, own = self.sampling, logits
        if sampling.bias or sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            logits = self._moved(logits)
        if sampling.temperature:
            weights = self.weights(logits)
            token = int(self._random.choice(len(weights), p=weights / weights.sum()))
        else:
            token = int(logits.argmax())
        if self.likeliest is not None:
            self._note(own, token)
        self._new[token] += 1
        if sampling.repetition_penalty != 1:
            self._text.add(token)
        return token

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """What is proportional to the chance of each token, float64 (vocabulary,): 0 for those that are cut."""
        sampling = self.sampling
        with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest alone
            weights: np.ndarray = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
        if 0 < sampling.top_k < len(weights):
            weights[weights < np.partition(weights, -sampling.top_k)[-sampling.top_k]] = 0
        if sampling.top_p < 1:
            order = np.argsort(weights, kind="stable")  # transformers' order among equals: the later stays
            below = np.cumsum(weights[order]) <= (1 - sampling.top_p) * weights.sum()
            below[-1] = False
            weights[order[below]] = 0
        if sampling.min_p:
            weights[weights < sampling.min_p * weights.max()] = 0
        return weights

    def _moved(self, logits: np.ndarray) -> np.ndarray:
        """The logits under bias and penalties."""
        sampling, logits = self.sampling, logits.copy()
        if self._text:
            ids = np.fromiter(self._text, dtype=np.int64)
            seen = logits[ids]
            logits[ids] = np.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
        for id, added in sampling.bias.items():
            logits[id] += added
        for id, count in self._new.items():
            logits[id] -= sampling.presence_penalty + sampling.frequency_penalty * count
        return logits

    def _note(self, logits: np.ndarray, token: int) -> None:
        shifted = (logits - logits.max()).astype(np.float64)
        logs = shifted - np.log(np.exp(shifted).sum())
        count = min(self.likeliest or 0, len(logs))
        best = np.argpartition(-logs, count - 1)[:count] if count else np.array([], dtype=np.int64)
        best = best[np.argsort(-logs[best], kind="stable")]
        self.noted.append((float(logs[token]), {int(id): float(logs[id]) for id in best}))
