"""A conversation with an artifact: the key-value cache is kept between turns, so that only new text is read."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.model_files import read_tokenizer_config
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime import generate
from edgepress.pipeline.runtime.chat_template import Message, read_template, special_tokens
from edgepress.pipeline.text.windows import check_ids
from tokenizers import Tokenizer


class Conversation:
    """The turns so far, and the cache of their tokens.

    read: tokens that had to be read before the last answer began. full: whether it ended because the context is full.
    """

    def __init__(self, folder: Path, options: RunOptions) -> None:
        """Raises InputError when the folder has no chat template."""
        template = read_template(folder)
        if template is None:
            raise InputError(
                f"{folder} has no chat template (its model continues text); add a chat_template.jinja, or continue text: "
                f'edgepress run {shlex.quote(str(folder))} "Once upon a time"'
            )
        model = generate.TextModel(folder, options.threads)
        self._template, self._tokenizer, self._options = template, model.tokenizer, options
        self._stop = model.stop | end_of_turn(folder, model.tokenizer)
        self._model, self.decoder = model, model.decoder
        self._random = np.random.default_rng(options.seed)
        self.forget()

    def forget(self) -> None:
        """Start a new conversation."""
        self.messages: list[Message] = []
        if self._options.system is not None:
            self.messages.append({"role": "system", "content": self._options.system})
        self.decoder.reset()
        self._fed: list[int] = []
        self.read, self.full = 0, False

    def answer(self, text: str) -> Generator[str]:
        """Pieces of the answer to a message, each as soon as its characters are whole; an interrupted answer is kept too.

        Raises OptionError when the conversation no longer fits into the context, and leaves it as it was.
        """
        generate.check_text(text + (self._options.system or ""))
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids
        if not ids:
            raise InputError("the chat template renders this message as an empty text; correct the template, or run without --chat")
        check_ids(ids, self._tokenizer, self.decoder.vocabulary, "the conversation")
        room = self.decoder.context - len(ids)
        if room < 1:
            raise OptionError(
                f"the context is full: {len(ids)} tokens with this message, and the model takes {self.decoder.context}; "
                "write a shorter one, or start afresh with /new"
            )
        self.messages, self.full = messages, False
        pieces: list[str] = []
        try:
            for piece in generate.pieces(self._tokenizer, ids[-1], self._tokens(ids, min(room, self._options.limit))):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            self.full = self.decoder.length >= self.decoder.context - 1

    def _tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        """Feed what the cache does not hold yet, and generate; a template may render earlier turns differently than before."""
        cached = self._fed[: self.decoder.length]
        common = next((i for i, (a, b) in enumerate(zip(cached, ids[:-1], strict=False)) if a != b), min(len(cached), len(ids) - 1))
        self.decoder.rewind(common)
        self._fed, self.read = list(ids), len(ids) - common
        new = np.array(ids[common:], dtype=np.int64)
        choose, guesses = self._model.sampler(self._options, self._random, ids), self._model.lookup(self._options.lookup, ids)
        for token in generate.tokens(self.decoder, new, self._stop, limit, choose, guesses):
            self._fed.append(token)
            yield token


def end_of_turn(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The end token of tokenizer_config.json: some chat models name the end of a turn only there."""
    token = special_tokens(read_tokenizer_config(folder)).get("eos_token")
    id = tokenizer.token_to_id(token) if token else None
    return frozenset() if id is None else frozenset({id})
