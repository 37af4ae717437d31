"""A conversation with an artifact: the key-value cache is kept between turns, so that only new text is read."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edgepress.pipeline.documents import DocumentError, typed
from edgepress.pipeline.errors import InputError, OptionError, OutputError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.model_files import read_tokenizer_config
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime import generate
from edgepress.pipeline.runtime.chat_template import Message, read_template, special_tokens
from edgepress.pipeline.text.windows import check_ids
from tokenizers import Tokenizer

LOOP, LOOP_EVERY = 128, 16  # tokens that must repeat a run, and after how many more that is looked at


@dataclass(frozen=True)
class _Message:
    role: str
    content: str


@dataclass(frozen=True)
class _Saved:
    """A file of ``save``."""

    messages: tuple[_Message, ...]


def _is_saved(file: Path) -> bool:
    """Whether a file holds what ``save`` writes, and nothing else that would be lost."""
    try:
        content = read_json(file)
        typed(_Saved, content, "conversation")
    except (DocumentError, InputError):
        return False
    return set(content) == {"messages"} and all(set(message) == {"role", "content"} for message in content["messages"])


class Conversation:
    """The turns so far, and the cache of their tokens.

    read: tokens that had to be read before the last answer began. ended: why the last answer ends where the model did not end it.
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
        self._template, self._tokenizer, self.options = template, model.tokenizer, options
        self._stop = model.stop | end_of_turn(folder, model.tokenizer)
        self._model, self.decoder = model, model.decoder
        self._random = np.random.default_rng(options.seed)
        self.forget()

    def forget(self) -> None:
        """Start a new conversation."""
        self.messages: list[Message] = []
        if self.options.system is not None:
            self.messages.append({"role": "system", "content": self.options.system})
        self.decoder.reset()
        self._fed: list[int] = []
        self.read, self.ended = 0, ""

    def set(self, **options: object) -> None:
        """Change options, which are checked already, for the answers to come; a seed, though the same, begins its numbers again."""
        self.options = dataclasses.replace(self.options, **options)  # type: ignore[arg-type]
        if "seed" in options:
            self._random = np.random.default_rng(self.options.seed)

    @property
    def drawing(self) -> str:
        """How tokens are drawn, in words."""
        sampling = self._model.sampling(self.options)
        penalty = f", repetition penalty {sampling.repetition_penalty:g}" if sampling.repetition_penalty != 1 else ""
        if not sampling.temperature:
            return f"the most likely tokens{penalty}"
        cuts = {"top-k": sampling.top_k, "top-p": sampling.top_p, "min-p": sampling.min_p}
        shown = [f"{name} {value:g}" for name, value in cuts.items() if value != (1 if name == "top-p" else 0)]
        return f"{', '.join([f'temperature {sampling.temperature:g}', *shown])}{penalty}"

    def save(self, file: Path) -> None:
        """Write the messages, over those of a conversation that was kept there. Raises OutputError for any other file."""
        if file.is_file() and not _is_saved(file):
            raise OutputError(f"{file} is there already, and no conversation; give another name")
        write_json(file, {"messages": self.messages})

    def load(self, file: Path) -> None:
        """Go on with the messages of a file. Raises InputError."""
        if not file.is_file():
            raise InputError(f"no such file: {file}; give one that /save wrote")
        try:
            messages = typed(_Saved, read_json(file), "conversation").messages
        except DocumentError as error:
            raise InputError(f"{file} is no conversation ({error})") from error
        if any(message.role not in ("system", "user", "assistant") for message in messages):
            raise InputError(f"{file} is no conversation: its roles must be system, user and assistant")
        self.forget()
        self.messages = [{"role": message.role, "content": message.content} for message in messages]

    def answer(self, text: str) -> Generator[str]:
        """Pieces of the answer to a message, each as soon as its characters are whole; an interrupted answer is kept too.

        Raises OptionError when the conversation no longer fits into the context, and leaves it as it was.
        """
        generate.check_text(text + (self.options.system or ""))
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
        self.messages, self.ended = messages, ""
        pieces: list[str] = []
        try:
            for piece in generate.pieces(self._tokenizer, ids[-1], self._tokens(ids, min(room, self.options.limit))):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        """Feed what the cache does not hold yet, and generate; a template may render earlier turns differently than before."""
        cached = self._fed[: self.decoder.length]
        common = next((i for i, (a, b) in enumerate(zip(cached, ids[:-1], strict=False)) if a != b), min(len(cached), len(ids) - 1))
        self.decoder.rewind(common)
        self._fed, self.read = list(ids), len(ids) - common
        new = np.array(ids[common:], dtype=np.int64)
        choose, guesses = self._model.sampler(self.options, self._random, ids), self._model.lookup(self.options.lookup, ids)
        for token in generate.tokens(self.decoder, new, self._stop, limit, choose, guesses):
            self._fed.append(token)
            yield token
            made = len(self._fed) - len(ids)
            if made == limit:
                self.ended = self._cut(limit)
            elif not choose.sampling.temperature and made % LOOP_EVERY == 0 and loops(self._fed[-min(made, LOOP) :]):
                self.ended = "the text repeats itself, so it ends here; /set temperature 0.8 varies it"
                return

    def _cut(self, limit: int) -> str:
        if limit < self.options.limit:
            return f"the context of {self.decoder.context} tokens is full, so the answer ends here; /new starts over"
        return f"cut at {limit} tokens; /set max_new_tokens N allows more"


def loops(ids: list[int]) -> bool:
    """Whether the ids are the same run again and again, four times at least."""
    return len(ids) == LOOP and any(ids[:-period] == ids[period:] for period in range(1, LOOP // 4 + 1))


def end_of_turn(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The end token of tokenizer_config.json: some chat models name the end of a turn only there."""
    token = special_tokens(read_tokenizer_config(folder)).get("eos_token")
    id = tokenizer.token_to_id(token) if token else None
    return frozenset() if id is None else frozenset({id})
