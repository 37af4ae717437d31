"""Text from an artifact, token by token, with onnxruntime alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OptionError, TextError
from edgepress.pipeline.flags import make
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.lookup import Lookup
from edgepress.pipeline.runtime.sampler import Sampler, Sampling, own_sampling, with_wishes
from edgepress.pipeline.runtime.whole import check_whole
from edgepress.pipeline.text.windows import check_ids, load_tokenizer
from tokenizers import Tokenizer

log = logging.getLogger("edgepress")
_OF_THE_COMMAND = {"chat", "system", "threads"}  # of RunOptions, and nothing to a stream


class TextModel:
    """An artifact folder ready to generate text: its tokenizer, end tokens, way of drawing and one onnxruntime session.

    decoder: of one sequence at a time; the next ``stream`` starts it afresh.
    """

    def __init__(self, folder: Path | str, threads: int = 0) -> None:
        """threads: of onnxruntime, 0 for its default. Raises InputError when the folder is not an artifact, or not whole."""
        self.folder = Path(folder)
        warnings = check_whole(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.stop = end_tokens(self.folder)
        self.own_sampling = own_sampling(self.folder)
        self.decoder = Decoder(self.folder, threads=threads)
        self._streams = 0
        for warning in warnings:
            log.warning("warning: %s", warning)

    def stream(self, prompt: str, max_new_tokens: int = 64, **options: object) -> Iterator[str]:
        """Pieces of the prompt's continuation, each as soon as its characters are whole.

        options: further ones of RunOptions by name, as temperature=0.8, seed=1. A model keeps one sequence: to advance
        a stream after a later one has begun raises OptionError, as do options out of range and a prompt whose tokens and new
        ones exceed the context. Raises TextError for a prompt without text.
        """
        for name in _OF_THE_COMMAND.intersection(options):
            raise OptionError(f"unknown option '{name}': a stream continues one text; edgepress run has it")
        return self.continued(prompt, make(RunOptions, {"max_new_tokens": max_new_tokens} | options))  # the command line's checks

    def continued(self, prompt: str, settings: RunOptions) -> Iterator[str]:
        """As ``stream``, by options that are checked."""
        check_text(prompt)
        ids: list[int] = self.tokenizer.encode(prompt).ids
        if not prompt or not ids:
            raise TextError("the prompt is empty; give some text to continue")
        check_ids(ids, self.tokenizer, self.decoder.vocabulary, "the prompt")
        needed = len(ids) + settings.limit
        if needed > self.decoder.context:
            raise OptionError(
                f"{len(ids)} prompt and {settings.limit} new tokens exceed the context of {self.decoder.context}; "
                "shorten the prompt or give fewer --max-new-tokens"
            )
        self.decoder.reset(needed)
        choose = self.sampler(settings, np.random.default_rng(settings.seed), ids)
        new = tokens(self.decoder, np.array(ids), self.stop, settings.limit, choose, self.lookup(settings.lookup, ids))
        self._streams += 1
        return self._own(pieces(self.tokenizer, ids[-1], new), self._streams)

    def sampler(self, settings: RunOptions, random: np.random.Generator, ids: list[int]) -> Sampler:
        """Draws as the options say, and where they do not, as the model's generation_config.json does."""
        return Sampler(self.sampling(settings), random, ids)

    def sampling(self, settings: RunOptions) -> Sampling:
        """How tokens are drawn by these options."""
        return with_wishes(self.own_sampling, settings)

    def lookup(self, wish: str, ids: list[int]) -> Lookup | None:
        """Guesses from the text of these ids; None where none are made, as a cache that is not shared is copied to forget one."""
        return Lookup(ids) if wish == "auto" and self.decoder.shared else None

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
    new = TextModel(folder, options.threads).continued(prompt, options)
    yield prompt
    yield from new


def check_text(text: str) -> None:
    """Raises TextError for text from a terminal that is not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError("the prompt is not UTF-8 text; check the terminal's encoding") from error


def tokens(
    decoder: Decoder,
    ids: np.ndarray,
    stop: frozenset[int],
    limit: int,
    choose: Callable[[np.ndarray], int],
    lookup: Lookup | None = None,
) -> Iterator[int]:
    """Feed ids int64 (tokens,) and yield up to ``limit`` new ones; ends before an id in ``stop``.

    choose: the next token by logits (vocabulary,), called once a token. lookup: of the whole text, which ``ids`` end. The tokens
    are those without it, as each is chosen by its own logits: a right guess saves a pass, a wrong one is forgotten before a
    token is yielded.
    """
    rows, guessed, left = decoder.feed(ids), list[int](), limit
    while True:
        new = list[int]()
        for row, guess in zip(rows, [*guessed, None], strict=True):
            new.append(choose(row))
            if new[-1] != guess or guess in stop:
                break
        if wrong := len(guessed) + 1 - len(new):
            decoder.rewind(decoder.length - wrong)
        for token in new:
            if token in stop:
                return
            if lookup:
                lookup.append(token)
            yield token
        left -= len(new)
        if not left:
            return
        guessed = lookup.guess(min(left, decoder.unswitched) - 1) if lookup else []
        rows = decoder.feed(np.array([new[-1], *guessed]), keep=0)


class Detokenizer:
    """The text of new tokens after the token ``before`` (which keeps a leading space), as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, before: int) -> None:
        self._tokenizer, self._ids = tokenizer, [before]
        self._told = len(tokenizer.decode([before]))

    def add(self, token: int) -> str | None:
        """What the next token adds to the text; None where it ends within a character, which may take several tokens."""
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return None
        new, self._told = text[self._told :], len(text)
        return new


def pieces(tokenizer: Tokenizer, before: int, new: Iterable[int]) -> Iterator[str]:
    """What a Detokenizer makes of new tokens."""
    text = Detokenizer(tokenizer, before)
    yield from (piece for token in new if (piece := text.add(token)) is not None)
