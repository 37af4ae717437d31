"""The whole model's states, recorded to files, so that it and the model to heal are never in memory together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress


def record(original: Checkpoint, windows: list[np.ndarray], indices: list[int], scratch: Path) -> dict[int, np.ndarray]:
    """What enters the blocks ``indices`` of ``original`` over the windows: (tokens, hidden) float32, mapped from files.

    The number of blocks as an index stands for what leaves the last one. scratch: the folder for the files.
    """
    blocks = Blocks(original.model())
    tokens, width = sum(map(len, windows)), blocks.model.config.hidden_size
    recorded = {i: np.memmap(scratch / f"{i}.float32", dtype=np.float32, mode="w+", shape=(tokens, width)) for i in indices}
    row = 0
    for ids, real in progress(batches(blocks.model, windows), "states of the whole model", "batch"):
        states, count = blocks.states(ids, indices), int(real.sum())
        for index, rows in recorded.items():
            rows[row : row + count] = states[index][real].numpy()
        row += count
    return dict(recorded)
