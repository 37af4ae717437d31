"""Across a change of rotary frequencies: what torch computes without a cache, and whether the decoder follows it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.models.rotary import switches
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.runtime.decoder import Decoder
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
AROUND = 8  # tokens that are read one by one on either side of a switch


@dataclass(frozen=True)
class Crossing:
    """A text across a switch: what is read at once, what one by one, both int64 (tokens,), and torch's logits.

    truth: float32 (1 + tokens one by one, vocabulary), of the last position of the first part and of every one after it.
    """

    first: np.ndarray
    then: np.ndarray
    truth: np.ndarray

    def read_by(self, decoder: Decoder) -> np.ndarray:
        """The decoder's logits of the same positions, through its cache."""
        decoder.reset()
        return np.concatenate([decoder.feed(self.first), *(decoder.feed(token) for token in np.split(self.then, len(self.then)))])


def crossings(reference: ReferenceLogits) -> list[Crossing]:
    """One for each switch of the model: the texts of the proof, again and again until they are long enough."""
    config, found = reference.model.config, []
    for switch in switches(config):
        log.info("export: reading %d tokens twice, for the proof where the rotary frequencies change", switch)
        ids = np.resize(np.concatenate(reference.windows), min(switch + AROUND, config.max_position_embeddings))
        first = max(1, switch - AROUND)
        found.append(Crossing(ids[:first], ids[first:], logits_as_read(reference.model, ids, len(ids) - first + 1)))
    return found


def logits_as_read(model: PreTrainedModel, ids: np.ndarray, keep: int) -> np.ndarray:
    """Logits float32 (keep, vocabulary) of the last positions of ids (tokens,), each as a text that ends there has them.

    One reading gives them all unless the frequencies change on the way: then what lies before is read by itself.
    """
    first, parts = len(ids) - keep, []
    for end in (*(switch for switch in switches(model.config) if first < switch < len(ids)), len(ids)):
        parts.append(logits_of(model, ids[:end], keep=end - first))
        first = end
    return np.concatenate(parts)
