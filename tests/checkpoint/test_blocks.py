"""Decoder blocks that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import machine
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.files import read_json
from edgepress.pipeline.text.windows import text_windows
from transformers import GPT2Config


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


@pytest.mark.parametrize("removed", [[], [3, 15]])
def test_the_head_by_rows_gives_the_logits(reference: Path, removed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the whole window, also where the last block is skipped, and never more of them than asked for.

    Bit for bit on some processors only: a matrix product of another height may add in another order.
    """
    blocks = Blocks(load_model(reference))
    ids = torch.from_numpy(text_windows(CALIBRATION_TEXT, reference, budget=100, length=100)[0])[None]
    sizes: list[int] = []
    monkeypatch.setattr(machine, "_FEWEST", 1)
    monkeypatch.setattr(machine, "_LOGITS", 32 * blocks.model.config.vocab_size)
    with blocks.without(removed):
        whole = blocks.logits(ids)[0]
        states = blocks.states(ids, [16])[16][0]
        handle = blocks.model.get_output_embeddings().register_forward_hook(lambda _, args, output: sizes.append(output.shape[1]))
        parts = list(blocks.heads(states))
        handle.remove()
        assert torch.equal(blocks.logits(ids)[0], whole)
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 32), (32, 64), (64, 96), (96, 100)]
    torch.testing.assert_close(torch.cat([logits for _, logits in parts]), whole, rtol=1e-5, atol=2e-5)
    assert sizes == [32, 32, 32, 4]


def test_the_head_of_learned_positions(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """States of many sequences are more than there are positions (GPT-2): the head takes no more at once."""
    folder = random_model(GPT2Config(vocab_size=5120, n_positions=64, n_embd=64, n_layer=2, n_head=4), tmp_path / "gpt2")
    blocks = Blocks(load_model(folder))
    rows = torch.cat([logits for _, logits in blocks.heads(torch.randn(150, 64))])
    assert rows.shape == (150, 5120) and torch.isfinite(rows).all()
