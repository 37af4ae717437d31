"""How a document begins that a model writes, and which tokens end it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from edgepress.models import PROMPTS
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.runtime.chat import end_of_turn
from edgepress.pipeline.runtime.chat_template import read_template
from edgepress.pipeline.text.windows import beginning

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Openings:
    """What a model is given to go on from.

    plain: the ids before any text, BOS for most models; empty where there is no such id. chats: the shipped prompts in the model's
    chat template, ids up to where its answer begins; none without a template. ends: ids that end a document. known: ids below this
    have a meaning to the tokenizer; the embedding may have more rows.
    """

    plain: list[int]
    chats: list[list[int]]
    ends: frozenset[int]
    known: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Openings:
        """Raises ModelError without a tokenizer."""
        tokenizer, config = checkpoint.tokenizer, checkpoint.raw_config
        known = min(tokenizer.get_vocab_size(with_added_tokens=True), int(checkpoint.config.get_text_config().vocab_size))
        ends = end_tokens(checkpoint.path) | end_of_turn(checkpoint.path, tokenizer)
        named = [id for id in (config.get("bos_token_id"), *sorted(ends)) if isinstance(id, int)]
        chats = [ids for ids in _chats(checkpoint) if max(ids) < known]
        plain = [id for id in beginning(tokenizer) if id < known]
        return cls(plain or [id for id in named if id < known][:1], chats, ends, known)

    def draw(self, number: int, random: np.random.Generator) -> list[int]:
        """The opening of document ``number`` of a row: plain ones and chats by turns, the prompt drawn; never empty."""
        if self.chats and (number % 2 or not self.plain):
            return self.chats[int(random.integers(len(self.chats)))]
        return self.plain or [int(random.integers(self.known))]


def _chats(checkpoint: Checkpoint) -> list[list[int]]:
    """The prompts as the chat template renders them; none, with a warning, where the template cannot be used."""
    try:
        template = read_template(checkpoint.path)
        if template is None:
            return []
        prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
        texts = [template.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    except InputError as error:
        log.warning("warning: the model writes its calibration text without its chat template (%s)", str(error).partition(";")[0])
        return []
    return [ids for text in texts if (ids := checkpoint.tokenizer.encode(text, add_special_tokens=False).ids)]
