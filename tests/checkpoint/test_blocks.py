"""Decoder blocks that are skipped."""

from __future__ import annotations

from pathlib import Path

import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.files import read_json
from edgepress.pipeline.text.windows import text_windows


def test_skipped_blocks_cost_nothing_and_come_back(reference: Path) -> None:
    """Skipping replaces the block, so that its matrices are not run; afterwards the model is what it was."""
    blocks = Blocks(load_model(reference))
    ids = torch.from_numpy(text_windows(CALIBRATION_TEXT, reference, budget=100, length=100)[0])[None]
    before = blocks.logits(ids)
    runs: list[int] = []
    handles = [block.mlp.register_forward_hook(lambda *_, i=index: runs.append(i)) for index, block in enumerate(blocks.modules)]
    with blocks.without([3, 7]):
        blocks.logits(ids)
    for handle in handles:
        handle.remove()
    assert runs == [i for i in range(16) if i not in (3, 7)]
    assert torch.equal(before, blocks.logits(ids))
    assert read_json(reference / "config.json")["num_hidden_layers"] == len(blocks)
