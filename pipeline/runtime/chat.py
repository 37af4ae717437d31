"""A conversation with an artifact: the key-value cache stays between turns, so that only what is new is read."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime import generate
from edgepress.pipeline.runtime.chat_template import Message, read_template, special_tokens
from edgepress.pipeline.runtime.decoder import Decoder, end_tokens
from edgepress.pipeline.text.windows import load_tokenizer


class Conversation:
    """Turns so far, and the cache of their tokens.

    read: tokens that the last answer had to read before its first. full: whether it ended because the context is full.
    """

    def __init__(self, folder: Path, options: RunOptions) -> None:
        """Raises InputError when the folder has no chat template."""
        template = read_template(folder)
        if template is None:
            raise InputError(
                f"{folder} has no chat template (its model continues texts); put one there, chat_template.jinja, or continue text: "
                f'edgepress run {shlex.quote(str(folder))} "Once upon a time"'
            )
        self._template, self._tokenizer, self._options = template, load_tokenizer(folder), options
        self._stop = end_tokens(folder) | _end_of_turn(folder)
        self.decoder = Decoder(folder, threads=options.threads)
        self._random = np.random.default_rng(options.seed)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.messages: list[Message] = []
        if self._options.system is not None:
            self.messages.append({"role": "system", "content": self._options.system})
        self.decoder.reset()
        self._fed: list[int] = []
        self.read, self.full = 0, False

    def answer(self, text: str) -> Generator[str]:
        """Pieces of the answer to a message, as soon as they are whole characters. What was told stays, also when interrupted.

        Raises OptionError when the conversation no longer fits into the context; it then goes on as if nothing was said.
        """
        generate.check_text(text + (self._options.system or ""))
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode(self._template.render(asked), add_special_tokens=False).ids
        if not ids:
            raise InputError("the chat template makes nothing of this message; correct it, or run without --chat")
        room = self.decoder.context - len(ids)
        if room < 1:
            raise OptionError(
                f"the context is full: {len(ids)} tokens with this message, and the model takes {self.decoder.context}; "
                "say something shorter, or start afresh with /new"
            )
        self.messages, self.full = asked, False
        pieces: list[str] = []
        try:
            for piece in generate.pieces(self._tokenizer, ids[-1], self._tokens(ids, min(room, self._options.limit))):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            self.full = self.decoder.length >= self.decoder.context - 1

    def _tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        """Feed what the cache does not hold yet, and generate; a template may tell former turns otherwise than they were fed."""
        known = self._fed[: self.decoder.length]
        same = next((i for i, (a, b) in enumerate(zip(known, ids[:-1], strict=False)) if a != b), min(len(known), len(ids) - 1))
        self.decoder.rewind(same)
        self._fed, self.read = list(ids), len(ids) - same
        new = np.array(ids[same:], dtype=np.int64)
        for token in generate.tokens(self.decoder, new, self._stop, limit, self._options.temperature, self._random):
            self._fed.append(token)
            yield token


def _end_of_turn(folder: Path) -> frozenset[int]:
    """The tokenizer's own end token: chat models may name the end of a turn there alone."""
    file = folder / "tokenizer_config.json"
    token = special_tokens(read_json(file)).get("eos_token") if file.is_file() else None
    number = load_tokenizer(folder).token_to_id(token) if token else None
    return frozenset() if number is None else frozenset({number})
