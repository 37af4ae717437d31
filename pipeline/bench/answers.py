"""What original and artifact are both asked, for people to read: one answer may show a failure that no mean shows."""

from __future__ import annotations

from collections.abc import Sequence
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
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a Python function that returns the larger of two numbers.",
)
PASSAGE = 32  # tokens of the text, for a model that does not chat


def asked(folder: Path, text: Sequence[Ids]) -> dict[Ids, str]:
    """Token ids, and what people read: questions in the model's chat template, or passages of as many windows of a text.

    None of those that leave too little of the context.
    """
    tokenizer, windows = load_tokenizer(folder), dict.fromkeys((text[0], text[len(text) // 2], text[-1]))
    found = {ids: _line(tokenizer.decode(ids)) for ids in map(_passage, windows)}
    with suppress(InputError):  # a template that refuses them
        if (template := read_template(folder)) is not None:
            chats: dict[Ids, str] = {}
            for question in QUESTIONS:
                chat = template.render([{"role": "user", "content": question}])
                chats.setdefault(tuple(tokenizer.encode(chat, add_special_tokens=False).ids), question)
            found = chats
    room = context_length(folder) - ANSWER_TOKENS
    return {ids: said for ids, said in found.items() if len(ids) <= room}


def answer(folder: Path, question: str, both: Continuations) -> Answer:
    """What the original and the artifact answered, as text up to the token that ends an answer. question: what people read.

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
    return Answer(question, original, artifact, parting)


def _line(text: str) -> str:
    return " ".join(text.split())


def _passage(window: Ids) -> Ids:
    """From the middle of a window, whose beginning may be a title; with the token that all windows begin with."""
    middle = len(window) // 2
    return (window[0], *window[max(1, middle - PASSAGE) : middle])
