"""Where a graph that failed its proof first departs: the residual stream of both models, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from edgepress.exporters.graph import block_output, save_at_level_0
from edgepress.pipeline.blocks import Blocks
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.runtime import Decoder
from transformers import PreTrainedModel


def first_departure(model: PreTrainedModel, folder: Path, pieces: Sequence[np.ndarray], limit: float) -> str:
    """Words that name the first block whose output is off by more than ``limit`` of its length at some position.

    pieces: ids int64 that follow one another, fed one by one through the cache.
    """
    count = model.config.num_hidden_layers
    names = [block_output(index) for index in range(count)]
    file = folder / "parity.onnx"
    try:
        save_at_level_0(folder / "model.onnx", file, names)
        decoder = Decoder(folder, model=file.name)
    finally:
        file.unlink(missing_ok=True)
    found: list[list[np.ndarray]] = []
    cache, length = None, 0
    for ids in pieces:
        length += len(ids)
        (_, *states), cache = decoder.step(ids[None], np.ones((1, length), dtype=np.int64), cache, names)
        found.append([state[0].astype(np.float32) for state in states])
    with suppress(ModelError):  # blocks of an architecture that cannot be told cannot be named
        wanted = Blocks(model).states(torch.from_numpy(np.concatenate(pieces))[None], range(1, count + 1))
        for index, parts in enumerate(zip(*found, strict=True)):
            expected = wanted[index + 1][0].numpy()
            lengths = np.linalg.norm(expected, axis=-1)
            if not (np.linalg.norm(np.concatenate(parts) - expected, axis=-1) <= limit * lengths).all():
                return f"layer {index} is the first to depart" + (", or the embedding before it" if not index else "")
        return "every layer agrees, so it is the final norm or the head"
    return "in which layer cannot be told"
