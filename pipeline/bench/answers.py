"""What original and artifact are both asked, for people to read: one answer may show a failure that no mean shows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from edgepress.pipeline.bench.evaluate import ANSWER_TOKENS, in_common
from edgepress.pipeline.bench.jobs import Continuations
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.report.model import Answer, Parting
from edgepress.pipeline.runtime.chat_template import read_template
from edgepress.pipeline.text.windows import context_length, load_tokenizer

Ids = tuple[int, ...]
QUESTION = "What is the capital of France?"
PASSAGE = 32  # tokens of the text, for a model that does not chat


def asked(folder: Path, window: Ids) -> Ids:
    """Token ids of the question in the model's chat template, or a passage of a text; empty where the context is too short."""
    ids = _passage(window)
    with suppress(InputError):  # a template that refuses it
        if (template := read_template(folder)) is not None:
            text = template.render([{"role": "user", "content": QUESTION}])
            ids = tuple(load_tokenizer(folder).encode(text, add_special_tokens=False).ids)
    return ids if len(ids) + ANSWER_TOKENS <= context_length(folder) else ()


def answer(folder: Path, window: Ids, both: Continuations) -> Answer:
    """What was asked, and answered by the original and the artifact, as text up to the token that ends an answer.

    Where they part within that, it is said how likely the original held either word.
    """
    tokenizer, ends = load_tokenizer(folder), end_tokens(folder)
    stops = [next((place for place, token in enumerate(ids) if token in ends), len(ids)) for ids in (both.original, both.artifact)]
    original, artifact = (
        _line(tokenizer.decode(ids[:stop])) + (" ..." if stop == len(ids) else "")
        for ids, stop in zip((both.original, both.artifact), stops, strict=True)
    )
    parting = None
    if both.held is not None:
        place = in_common(both.original, both.artifact)
        if place <= min(stops) and set(stops) != {place}:  # where both end, though by another token, nothing of it is seen
            own, other = (tokenizer.decode([ids[place]], skip_special_tokens=False) for ids in (both.original, both.artifact))
            parting = Parting(own, other, *both.held)
    prompt = _line(tokenizer.decode(both.asked)) if both.asked == _passage(window) else QUESTION
    return Answer(prompt, original, artifact, parting)


def _line(text: str) -> str:
    return " ".join(text.split())


def _passage(window: Ids) -> Ids:
    """From the middle of a window, whose beginning may be a title; with the token that all windows begin with."""
    middle = len(window) // 2
    return (window[0], *window[max(1, middle - PASSAGE) : middle])
