"""What original and artifact are both asked, for people to read: one answer may show a failure that no mean shows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from edgepress.pipeline.bench.evaluate import ANSWER_TOKENS
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.report.model import Answer
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


def answer(folder: Path, window: Ids, ids: Ids, *continued: Ids) -> Answer:
    """What was asked, and answered by the original and the artifact, as text up to the token that ends an answer."""
    tokenizer, ends = load_tokenizer(folder), end_tokens(folder)

    def text(tokens: Ids) -> str:
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        return _line(tokenizer.decode(tokens[:stop])) + (" ..." if stop == len(tokens) else "")

    prompt = _line(tokenizer.decode(ids)) if ids == _passage(window) else QUESTION
    return Answer(prompt, *map(text, continued))


def _line(text: str) -> str:
    return " ".join(text.split())


def _passage(window: Ids) -> Ids:
    """From the middle of a window, whose beginning may be a title; with the token that all windows begin with."""
    middle = len(window) // 2
    return (window[0], *window[max(1, middle - PASSAGE) : middle])
