"""Where a graph that failed its proof first departs: the residual stream of both models, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from edgepress.exporters.graph.builder import block_output
from edgepress.exporters.graph.files import variant
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.runtime.decoder import Decoder
from transformers import PreTrainedModel


def first_mismatch(model: PreTrainedModel, folder: Path, texts: Sequence[Sequence[np.ndarray]], limit: float) -> str:
    """Words that name the first block whose output is off by more than ``limit`` of its length at some position.

    texts: sequences as pieces of ids int64 (tokens,), which are fed one after another through the cache.
    """
    names = [block_output(index) for index in range(model.config.num_hidden_layers)]
    with variant(folder, also=names) as file:
        decoder = Decoder(folder, model=file)
    try:
        blocks = Blocks(model)
    except ModelError:
        return "in which layer cannot be told"
    for pieces in texts:
        wanted = blocks.states(torch.from_numpy(np.concatenate(pieces))[None], range(1, len(blocks) + 1))
        for index, found in enumerate(_streams(decoder, pieces, names)):
            expected = wanted[index + 1][0].numpy()
            distance, length = np.linalg.norm(found - expected, axis=-1), np.linalg.norm(expected, axis=-1)
            if not (distance <= limit * length).all():
                return f"layer {index} is the first to depart" + (", or the embedding before it" if not index else "")
    return "every layer agrees, so it is the final norm or the head"


def _streams(decoder: Decoder, pieces: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """The values ``names``, float32 (tokens, hidden) each, over all pieces."""
    found: list[list[np.ndarray]] = [[] for _ in names]
    cache, length = None, 0
    for ids in pieces:
        length += len(ids)
        (_, *states), cache = decoder.step(ids[None], np.ones((1, length), dtype=np.int64), cache, names)
        for parts, state in zip(found, states, strict=True):
            parts.append(state[0].astype(np.float32))
    return [np.concatenate(parts) for parts in found]
