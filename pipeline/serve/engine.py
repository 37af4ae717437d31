"""The one thread that runs the model: requests wait in line, those that run take turns, and caches of finished ones are kept.

A request that begins like an earlier one (the next turn of a conversation) takes over its cache and reads only what is new.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from edgepress.pipeline.artifact import called
from edgepress.pipeline.errors import EdgepressError, InputError
from edgepress.pipeline.options import ServeOptions
from edgepress.pipeline.runtime.chat import end_of_turn
from edgepress.pipeline.runtime.chat_template import Message, read_template
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.generate import Detokenizer, TextModel, tokens
from edgepress.pipeline.runtime.sampler import Sampler, Sampling
from edgepress.pipeline.runtime.stop_words import StopWords
from edgepress.pipeline.text.windows import check_ids

log = logging.getLogger("edgepress")
CHUNK = 512  # tokens of a prompt that are read before others have their turn
WORTH = 16  # tokens in common for which a cache is taken over


class Busy(EdgepressError):
    """As many requests wait as may wait."""


class Closed(EdgepressError):
    """The engine has ended."""

    def __init__(self) -> None:
        super().__init__("the server is ending")


@dataclass(frozen=True)
class Piece:
    """New text. tokens: its ids; noted: as Sampler.noted, of each of them, where the request asked."""

    text: str
    tokens: list[int]
    noted: list[tuple[float, dict[int, float]]]


@dataclass(frozen=True)
class Done:
    """The end: "stop" or "length", tokens of the prompt, those of them that were in a cache, and new ones."""

    reason: str
    prompt: int
    cached: int
    new: int


@dataclass(frozen=True)
class Failed:
    """The end, by an error."""

    error: Exception


Event = Piece | Done | Failed
Steps = Generator[Event | None]


@dataclass
class Job:
    """What a request wants, and where its text goes.

    ids: of the prompt. likeliest: as Sampler's. deliver: called from the engine's thread with one Piece after another, and a Done
    or Failed at the end, unless ``cancelled`` was set before. deadline: on the monotonic clock.
    """

    ids: list[int]
    limit: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    likeliest: int | None
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float = float("inf")


@dataclass
class _Seat:
    """A cache, the ids whose keys and values it holds, the tokens that a running request may need, and when it was last used."""

    decoder: Decoder
    ids: list[int]
    needed: int
    used: float = 0.0


class Engine:
    """A loaded artifact and its thread.

    waiting, running: requests in line, and those that take turns.
    """

    def __init__(self, folder: Path, options: ServeOptions) -> None:
        """Raises InputError when the folder is not an artifact, or not whole."""
        self.options, self.name = options, called(folder)
        self.model = TextModel(folder, options.threads)
        self.template = read_template(folder)
        self.stop = self.model.stop | end_of_turn(folder, self.model.tokenizer)
        self.waiting: deque[Job] = deque()
        self.running = 0
        self._budget = int(options.memory * 1e9)
        self._seats: list[_Seat] = []
        self._taken: list[_Seat] = []
        self._changed = threading.Condition()
        self._closed = False
        self._rendering, self._encoding = threading.Lock(), threading.Lock()
        self._longest = max(len(token.encode()) for token in self.model.tokenizer.get_vocab())  # bytes that a token can stand for
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def cache_bytes(self) -> int:
        """Memory of all caches."""
        return sum(map(self._bytes, [*self._seats, *self._taken]))

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together: the model's, or what fits into the memory for caches."""
        return min(self.model.decoder.context, self._budget // self.model.decoder.cache_bytes(1))

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation, which the model's answer is to follow. Raises InputError."""
        if self.template is None:
            raise InputError("this model has no chat template: it continues text, at /v1/completions")
        self._check_line()
        with self._rendering:  # one process answers one question after the other
            text = self.template.render(messages)
        return self.checked(self._encoded(text, "the conversation", special=False), "the conversation")

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text to continue. Raises InputError."""
        return self.checked(self._encoded(text, "the prompt", special=True), "the prompt")

    def _encoded(self, text: str, what: str, special: bool) -> list[int]:
        """Ids of a text. Raises InputError for one that cannot fit, which is not read, and Busy where nothing more is taken in."""
        most = self._longest * self.context
        if len(text.encode()) > most:
            raise InputError(f"{what} is longer than the context of {self.context} tokens can be; shorten it")
        self._check_line()
        with self._encoding:  # a batch, even of one, is encoded while other threads run
            ids: list[int] = self.model.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def checked(self, ids: list[int], what: str) -> list[int]:
        """``ids``, if they can be read and leave room for an answer. Raises InputError."""
        if not ids:
            raise InputError(f"{what} has no tokens")
        check_ids(ids, self.model.tokenizer, self.model.decoder.vocabulary, what)
        if len(ids) >= self.context:
            raise InputError(f"{what} has {len(ids)} tokens, and the context is {self.context} with the answer; shorten it")
        return ids

    def submit(self, job: Job) -> None:
        """Put a request into the line. Raises Busy or Closed."""
        with self._changed:
            self._check_line()
            self.waiting.append(job)
            self._changed.notify()

    def _check_line(self) -> None:
        """Raises Closed, and Busy where as many wait as may."""
        with self._changed:
            if self._closed:
                raise Closed
            self._forget_cancelled()
            if len(self.waiting) >= self.options.queue:
                raise Busy(f"{len(self.waiting)} requests wait already; try again in a moment")

    def _forget_cancelled(self) -> None:
        """Whoever left the line holds nobody up."""
        self.waiting = deque(job for job in self.waiting if not job.cancelled.is_set())

    def close(self) -> None:
        """End the thread; what runs ends with it, and is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        """One step of each running request in turn."""
        active: list[tuple[Job, Steps]] = []
        while True:
            with self._changed:
                while not self._closed and not active and not self.waiting:
                    self._changed.wait()
                if self._closed:
                    break
                fitting = self._admitted(len(active))
            active += [(job, self._steps(job)) for job in fitting]
            active = [(job, steps) for job, steps in active if self._step(job, steps)]
            self.running = len(active)
        for job in [*(job for job, _ in active), *self.waiting]:
            job.deliver(Failed(Closed()))

    def _admitted(self, running: int) -> list[Job]:
        """The first in line that may run beside ``running`` others: by their number, and by the memory of the caches."""
        self._forget_cancelled()
        fitting, reserved = list[Job](), sum(map(self._bytes, self._taken))
        while self.waiting and running + len(fitting) < self.options.parallel:
            needed = self.model.decoder.cache_bytes(len(self.waiting[0].ids) + self.waiting[0].limit)
            if (running or fitting) and reserved + needed > self._budget:
                break
            reserved += needed
            fitting.append(self.waiting.popleft())
        return fitting

    @staticmethod
    def _bytes(seat: _Seat) -> int:
        """What a cache takes, and while a request runs what it may yet take."""
        return seat.decoder.cache_bytes(max(seat.decoder.held, seat.needed))

    def _step(self, job: Job, steps: Steps) -> bool:
        """One step of a request; whether there are more."""
        event: Event | None = None
        over = job.cancelled.is_set()
        try:
            event = None if over else next(steps)
            if over := over or isinstance(event, Done | Failed):
                steps.close()  # whoever hears of the end finds the cache where it belongs
        except Exception as error:
            event, over = Failed(error), True
        if event is not None:
            job.deliver(event)
        return not over

    def _steps(self, job: Job) -> Steps:
        """The events of a request, with None where it only lets others have their turn."""
        seat, cached = self._seat(job)
        self._taken.append(seat)
        try:
            yield from self._generated(job, seat, cached)
        finally:
            self._taken.remove(seat)
            seat.ids = seat.ids[: seat.decoder.length]
            seat.needed, seat.used = 0, time.monotonic()
            self._seats.append(seat)
            self._give_back()

    def _seat(self, job: Job) -> tuple[_Seat, int]:
        """A cache for a request, out of those kept or a new one, and how much of the prompt it holds."""
        common, seat = max(((_common(seat.ids, job.ids), seat) for seat in self._seats), key=lambda row: row[0], default=(0, None))
        needed, decoder = len(job.ids) + job.limit, self.model.decoder
        if seat is not None and common >= min(WORTH, max(1, len(job.ids) - 2)):
            self._seats.remove(seat)
            self._give_back(decoder.cache_bytes(max(needed, seat.decoder.held)))
            seat.decoder.rewind(common)
            seat.decoder.reserve(needed)
            seat.ids, seat.needed = list(job.ids), needed
            return seat, common
        self._give_back(decoder.cache_bytes(needed))
        return _Seat(decoder.twin(needed), list(job.ids), needed), 0

    def _give_back(self, needed: int = 0) -> None:
        """Forget caches, the longest unused first, until ``needed`` bytes more are free."""
        self._seats.sort(key=lambda seat: seat.used)
        while self._seats and needed + sum(self._bytes(seat) for seat in self._seats + self._taken) > self._budget:
            del self._seats[0]

    def _generated(self, job: Job, seat: _Seat, cached: int) -> Iterator[Event | None]:
        unread = job.ids[cached:]
        while len(unread) > CHUNK:
            size = CHUNK if len(unread) > CHUNK + 1 else CHUNK - 1  # see _common: no token is read alone
            seat.decoder.feed(np.array(unread[:size]))
            unread = unread[size:]
            yield None
        choose = Sampler(job.sampling, np.random.default_rng(job.seed), job.ids, job.likeliest)
        lookup = self.model.lookup(self.options.lookup, job.ids)
        text, words = Detokenizer(self.model.tokenizer, job.ids[-1]), StopWords(job.stop)
        new, told = list[int](), 0
        late = False
        for token in tokens(seat.decoder, np.array(unread), self.stop, job.limit, choose, lookup):
            new.append(token)
            seat.ids.append(token)
            shown = words.add(text.add(token) or "")
            if shown:
                yield Piece(shown, new[told:], choose.noted[told : len(new)])
                told = len(new)
            if words.found or (late := time.monotonic() > job.deadline):
                break
            if not shown:
                yield None  # a token without a text is a turn, too
        if rest := words.rest():
            yield Piece(rest, new[told:], choose.noted[told : len(new)])
        ended = words.found or not (late or len(new) == job.limit)
        yield Done("stop" if ended else "length", len(job.ids), cached, len(new))


def _common(a: list[int], b: list[int]) -> int:
    """Ids that both begin with, but for the last two of ``b``, which are read to know what follows.

    One would do, but int8 activations round a token that is read alone otherwise: the same request would get another answer.
    """
    most = max(0, min(len(a), len(b) - 2))
    return next((place for place in range(most) if a[place] != b[place]), most)
