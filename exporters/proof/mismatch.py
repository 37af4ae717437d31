"""Where a graph that failed its proof first differs: the residual stream of both models, block by block."""

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
    """Words that name the first block whose output differs by more than ``limit`` times its norm at some position.

    texts: sequences as pieces of ids int64 (tokens,), which are fed one after another through the cache.
    """
    names = all_names = [block_output(index) for index in range(model.config.num_hidden_layers)]
    with variant(folder, outputs=names) as file:
        decoder = Decoder(folder, model=file)
    outputs = {node.name for node in decoder.session.get_outputs()}
    names = [name for name in names if name in outputs]  # a block without its two parts has no output of its own
    try:
        blocks = Blocks(model)
    except ModelError:
        return "the layer cannot be determined"
    for pieces in texts:
        states = blocks.states(torch.from_numpy(np.concatenate(pieces))[None], range(1, len(blocks) + 1))
        for name, exported in zip(names, _streams(decoder, pieces, names), strict=True):
            index = all_names.index(name)
            reference = states[index + 1][0].numpy()
            distance, norm = np.linalg.norm(exported - reference, axis=-1), np.linalg.norm(reference, axis=-1)
            if not (distance <= limit * norm).all():
                return f"layer {index} is the first that differs" + (", or the embedding before it" if not index else "")
    return "every layer agrees, so it is the final norm or the head"


def _streams(decoder: Decoder, pieces: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """The values ``names``, float32 (tokens, hidden) each, over all pieces."""
    streams: list[list[np.ndarray]] = [[] for _ in names]
    cache, length = None, 0
    for ids in pieces:
        length += len(ids)
        (_, *states), cache = decoder.step(ids[None], np.ones((1, length), dtype=np.int64), cache, names)
        for stream, state in zip(streams, states, strict=True):
            stream.append(state[0].astype(np.float32))
    return [np.concatenate(stream) for stream in streams]
