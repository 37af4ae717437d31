"""Lookup decoding: the tokens are those without it, in fewer passes where text repeats; and it ends where it does not pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.generate import TextModel, tokens
from edgepress.pipeline.runtime.lookup import Lookup
from edgepress.pipeline.runtime.sampler import Sampler, Sampling

TEXT = np.array([5, 9, 40, 41, 42, 43, 44, 45, 46, 7, 8, 40, 41, 42, 43], dtype=np.int64)


@pytest.fixture(scope="module")
def decoder(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The random Llama, which soon repeats itself; level 0, as int8 activations round a row alone and among others differently."""
    folder = tmp_path_factory.mktemp("lookup")
    packed = stages.run("quantize", Artifact.load(tiny), folder / "packed", QuantizeOptions(method="rtn", group_size=32))
    return Decoder(stages.run("export", packed, folder / "onnx", ExportOptions(accuracy_level="0", text=text)).path, threads=1)


@pytest.fixture
def free_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes over many tokens that take what one takes, so that a guess is made wherever there is one."""
    monkeypatch.setattr(Lookup, "_cost", lambda *_: 1.0)


@pytest.fixture
def passes(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass."""
    seen, real = list[int](), decoder.feed

    def feed(ids: np.ndarray, keep: int = 1) -> np.ndarray:
        seen.append(len(ids))
        return real(ids, keep)

    monkeypatch.setattr(decoder, "feed", feed)
    return seen


def sampler(temperature: float = 0.0) -> Sampler:
    return Sampler(Sampling(temperature), np.random.default_rng(3))


def generated(decoder: Decoder, limit: int, lookup: Lookup | None, temperature: float = 0.0) -> Iterator[int]:
    """New tokens behind TEXT."""
    decoder.reset()
    return tokens(decoder, TEXT, frozenset(), limit, sampler(temperature), lookup)


@pytest.mark.parametrize("temperature", [0.0, 0.02], ids=["greedy", "drawn"])
def test_the_tokens_are_those_without_it(decoder: Decoder, passes: list[int], free_tokens: None, temperature: float) -> None:
    """In fewer passes, and never one beyond the limit."""
    plain = list(generated(decoder, 60, None, temperature=temperature))
    assert len(passes) == 60
    passes.clear()
    assert list(generated(decoder, 60, Lookup(TEXT.tolist()), temperature=temperature)) == plain
    assert len(passes) < 45 and max(passes[1:]) > 2, passes
    assert decoder.length == len(TEXT) + 59


class Recited:
    """A decoder of a model that knows one text by heart, and what its cache holds."""

    unswitched = 1000

    def __init__(self, text: list[int]) -> None:
        self.text, self.cache = text, list[int]()

    @property
    def length(self) -> int:
        """As Decoder's."""
        return len(self.cache)

    def rewind(self, length: int) -> None:
        """As Decoder's."""
        del self.cache[length:]

    def feed(self, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        """As Decoder's."""
        logits = np.zeros((len(ids), 100), dtype=np.float32)
        logits[np.arange(len(ids)), self.text[len(self.cache) + 1 :][: len(ids)]] = 1
        self.cache += ids.tolist()
        return logits[-keep:]


@pytest.mark.parametrize("limit", [4, 20])
def test_a_guess_may_hold_the_end(free_tokens: None, limit: int) -> None:
    """The text ends before it, or at the limit, and the cache holds what was yielded and no more."""
    turn = [1, 2, 3, 4, 5, 6, 99, 7]
    model, lookup = Recited([*turn, *turn, *turn, *turn, *turn]), Lookup(turn + turn[:2])
    new = tokens(model, np.array(turn + turn[:2]), frozenset({99}), limit, sampler(), lookup)  # type: ignore[arg-type]
    assert list(new) == [3, 4, 5, 6][:limit]
    assert model.cache == (turn + turn)[: model.length] and model.length in (13, 14)


def test_what_is_cut_short_may_go_on(decoder: Decoder, passes: list[int], free_tokens: None) -> None:
    """After each token yielded the cache holds nothing that is not of the text: what a conversation keeps is right."""
    plain = list(generated(decoder, 40, None))
    for count in (1, 7, 20, 33):
        new = generated(decoder, 40, Lookup(TEXT.tolist()))
        begun = [next(new) for _ in range(count)]
        assert begun == plain[:count]
        known = [*TEXT.tolist(), *begun]
        kept = min(decoder.length, len(known) - 1)
        decoder.rewind(kept)
        rest = tokens(decoder, np.array(known[kept:]), frozenset(), 40 - count, sampler())
        assert begun + list(rest) == plain


def told(lookup: Lookup, ids: list[int]) -> Lookup:
    """After so many more tokens."""
    for id in ids:
        lookup.append(id)
    return lookup


def test_it_guesses_what_followed_the_longest_match(free_tokens: None) -> None:
    assert Lookup([1, 2, 3, 4, 50, 51, 52, 9, 3, 4, 60, 61, 62, 8, 1, 2, 3, 4]).guess(2) == [50, 51]  # two match later, four here
    lookup = Lookup([1, 2, 3, 4, 50, 51, 52, 9, 3, 4, 60, 61, 62, 8, 7, 3, 4])
    assert lookup.guess(3) == [60, 61, 62] and lookup.guess(0) == []
    assert Lookup([7, 8, 8, 8, 8]).guess(4) == [8, 8, 8, 8]  # beyond the end of what is known
    assert Lookup([1, 2, 3]).guess(5) == []


def test_it_guesses_as_many_as_pay() -> None:
    """By what came true; and again once that changes, although none was made in between."""
    run = list(range(100, 130))
    lookup = Lookup([*run, *run, *run])
    assert len(lookup.guess(16)) > 4 and len(lookup.guess(3)) == 3
    told(lookup, np.random.default_rng(0).integers(0, 9, 400).tolist())  # pairs have been seen before, and tell little
    assert not lookup.guess(16)
    told(lookup, run * 3)
    assert len(lookup.guess(16)) > 4


def test_the_command_line_and_python_take_the_wish(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, call: Callable) -> None:
    """Off: each pass reads one token."""
    folder, sizes = decoder._file.parent, list[int]()
    monkeypatch.setattr(Lookup, "guess", lambda _, limit: sizes.append(limit) or [])
    off = "".join(TextModel(folder).stream("One day", max_new_tokens=8, lookup="off"))
    assert not sizes
    assert "".join(TextModel(folder).stream("One day", max_new_tokens=8)) == off and len(sizes) > 3
    result = call("run", folder, "One day", "--max-new-tokens", 4, "--lookup", "never")
    assert result.code == 2 and "auto" in result.err
