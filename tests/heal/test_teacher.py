"""The recorded states are the whole model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.heal.teacher import record
from edgepress.pipeline.text.windows import text_windows


def test_recorded_states_are_the_whole_models(reference: Path, tmp_path: Path) -> None:
    """Also after the last block and for windows of unequal length; the head on them gives the whole model's logits."""
    windows = [
        row[:n] for row, n in zip(text_windows(CALIBRATION_TEXT, reference, budget=300, length=100), (100, 40, 77), strict=False)
    ]
    recorded = record(Checkpoint(reference), windows, [6, 16], tmp_path)
    blocks = Blocks(load_model(reference))
    row = 0
    for ids in windows:
        states = blocks.states(torch.from_numpy(ids)[None], [6, 16])
        for index in (6, 16):
            rows = recorded[index][row : row + len(ids)]
            assert np.abs(rows - states[index][0].numpy()).max() < 1e-4 * np.abs(rows).max()
        with blocks.entering(16, torch.from_numpy(np.array(recorded[16][row : row + len(ids)]))[None]):
            logits = blocks.logits(torch.from_numpy(ids)[None])
        assert float((logits - blocks.logits(torch.from_numpy(ids)[None])).abs().max()) < 1e-3
        row += len(ids)
