"""Text from an artifact, token by token, with onnxruntime alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OptionError, TextError
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime.decoder import Decoder, end_tokens
from edgepress.pipeline.text.windows import load_tokenizer
from tokenizers import Tokenizer


def stream(folder: Path, prompt: str, options: RunOptions) -> Iterator[str]:
    """The prompt, then pieces of its continuation, one a token, as soon as they are whole characters.

    temperature: 0 takes the most likely token; above it, tokens are drawn from softmax(logits / temperature).
    Raises TextError for a prompt without text, OptionError when prompt and new tokens exceed the context.
    """
    check_text(prompt)
    tokenizer = load_tokenizer(folder)
    ids = np.array(tokenizer.encode(prompt).ids, dtype=np.int64)
    if not prompt or not len(ids):
        raise TextError("the prompt is empty; give some text to continue")
    decoder = Decoder(folder, threads=options.threads)
    room = len(ids) + options.limit
    if room > decoder.context:
        raise OptionError(
            f"{len(ids)} prompt and {options.limit} new tokens exceed the context of {decoder.context}; "
            "shorten the prompt or give fewer --max-new-tokens"
        )
    decoder.reset(room)
    random = np.random.default_rng(options.seed)
    yield prompt
    new = tokens(decoder, ids, end_tokens(folder), options.limit, options.temperature, random)
    yield from pieces(tokenizer, int(ids[-1]), new)


def check_text(text: str) -> None:
    """Raises TextError for what a terminal gave that is no UTF-8."""
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
    """The text of new tokens after the token ``before`` (so that a leading space is kept), as soon as its characters are whole."""
    ids: list[int] = []
    told, start = "", len(tokenizer.decode([before]))
    for token in new:
        ids.append(token)
        whole = tokenizer.decode([before, *ids])[start:]
        if not whole.endswith("\ufffd"):  # a character may take several tokens
            yield whole[len(told) :]
            told = whole


def _choose(logits: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))
