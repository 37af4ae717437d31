"""Text from an artifact, token by token, with onnxruntime alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OptionError, TextError
from edgepress.pipeline.flags import make
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.whole import check_whole
from edgepress.pipeline.text.windows import check_ids, load_tokenizer
from tokenizers import Tokenizer

log = logging.getLogger("edgepress")


class TextModel:
    """An artifact folder ready to generate text: its tokenizer, its end tokens and one onnxruntime session.

    decoder: of one sequence at a time; the next ``stream`` starts it afresh.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        """threads: of onnxruntime, 0 for its default. Raises InputError when the folder is not an artifact, or not whole."""
        self.folder = Path(folder)
        warnings = check_whole(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.stop = end_tokens(self.folder)
        self.decoder = Decoder(self.folder, threads=threads)
        self._streams = 0
        for warning in warnings:
            log.warning("warning: %s", warning)

    def stream(self, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Pieces of the prompt's continuation, each as soon as its characters are whole.

        temperature: 0 takes the most likely token; above it, tokens are drawn from softmax(logits / temperature), seeded.
        A model keeps one sequence: to advance a stream after a later one has begun raises OptionError, as do options out of range
        and a prompt whose tokens and new ones exceed the context. Raises TextError for a prompt without text.
        """
        make(RunOptions, {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed})  # the command line's checks
        check_text(prompt)
        ids = np.array(self.tokenizer.encode(prompt).ids, dtype=np.int64)
        if not prompt or not len(ids):
            raise TextError("the prompt is empty; give some text to continue")
        check_ids(ids.tolist(), self.tokenizer, self.decoder.vocabulary, "the prompt")
        needed = len(ids) + max_new_tokens
        if needed > self.decoder.context:
            raise OptionError(
                f"{len(ids)} prompt and {max_new_tokens} new tokens exceed the context of {self.decoder.context}; "
                "shorten the prompt or give fewer --max-new-tokens"
            )
        self.decoder.reset(needed)
        random = np.random.default_rng(seed)
        new = tokens(self.decoder, ids, self.stop, max_new_tokens, temperature, random)
        self._streams += 1
        return self._own(pieces(self.tokenizer, int(ids[-1]), new), self._streams)

    def _own(self, new: Iterator[str], number: int) -> Iterator[str]:
        """The pieces, as long as no later stream has taken the decoder."""
        while self._streams == number:
            if (piece := next(new, None)) is None:
                return
            yield piece
        raise OptionError("a later stream has begun on this model, which keeps one sequence; load it again to have two at once")


def stream(folder: Path, prompt: str, options: RunOptions) -> Iterator[str]:
    """The prompt, then what ``TextModel.stream`` yields."""
    check_text(prompt)
    new = TextModel(folder, options.threads).stream(prompt, options.limit, options.temperature, options.seed)
    yield prompt
    yield from new


def check_text(text: str) -> None:
    """Raises TextError for text from a terminal that is not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError("the prompt is not UTF-8 text; check the terminal's encoding") from error


def tokens(
    decoder: Decoder, ids: np.ndarray, stop: frozenset[int], limit: int, temperature: float, random: np.random.Generator
) -> Iterator[int]:
    """Feed ids int64 (tokens,) and yield up to ``limit`` new ones, each before it is fed; ends before an id in ``stop``."""
    logits = decoder.feed(ids)[-1]
    for count in range(limit):
        token = _choose(logits, temperature, random)
        if token in stop:
            return
        yield token
        if count + 1 < limit:
            logits = decoder.feed(np.array([token]))[-1]


def pieces(tokenizer: Tokenizer, before: int, new: Iterable[int]) -> Iterator[str]:
    """The text of new tokens after the token ``before`` (which keeps a leading space), as soon as its characters are whole."""
    ids: list[int] = []
    yielded, start = "", len(tokenizer.decode([before]))
    for token in new:
        ids.append(token)
        text = tokenizer.decode([before, *ids])[start:]
        if not text.endswith("\ufffd"):  # a character may take several tokens
            yield text[len(yielded) :]
            yielded = text


def _choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))
