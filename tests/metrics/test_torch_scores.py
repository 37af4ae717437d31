"""Losses of a torch model: the values known of shared models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import machine
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import exact_losses, mean_loss
from edgepress.pipeline.prune.criteria import kl_without
from edgepress.pipeline.text.windows import text_windows


def test_known_perplexities(shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """The measured values that came with the shared models, by their protocol: full, and without single layers."""
    known = {"stories260k": (4.27, {0: 102, 4: 10.1}), "babyllama-361": (2.20, {1: 21.4, 4: 4.81})}
    for name, (full, without) in known.items():
        folder = shared_model(name)
        model = load_model(folder)
        windows = text_windows(tinystories, folder, budget=16000)
        assert np.exp(mean_loss(model, windows)) == pytest.approx(full, rel=2e-3)
        for index, value in without.items():
            with Blocks(model).without([index]):
                assert np.exp(mean_loss(model, windows)) == pytest.approx(value, rel=2e-2)


def test_no_more_logits_than_a_small_memory_holds(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and divergence take the head by rows: the logits of whole windows of a large vocabulary would take gigabytes."""
    blocks = Blocks(load_model(reference))
    windows = text_windows(CALIBRATION_TEXT, reference, budget=300, length=100)
    with torch.inference_mode():
        logits = [blocks.model(input_ids=torch.from_numpy(row)[None]).logits[0] for row in windows]
    losses = [torch.nn.functional.cross_entropy(x[:-1], torch.from_numpy(row[1:])) for x, row in zip(logits, windows, strict=True)]
    monkeypatch.setattr(machine, "_FEWEST", 1)
    monkeypatch.setattr(machine, "_LOGITS", 10 * blocks.model.config.vocab_size)
    rows: list[int] = []
    blocks.model.get_output_embeddings().register_forward_hook(lambda _, args, output: rows.append(output.shape[1]))
    assert mean_loss(blocks, windows) == pytest.approx(
        float(np.average(losses, weights=[len(row) - 1 for row in windows])), abs=1e-5
    )
    assert exact_losses(blocks, windows, "loss").mean() == pytest.approx(mean_loss(blocks, windows), abs=1e-6)
    assert kl_without(blocks, [[], [3]], windows)[0] == 0
    assert rows and max(rows) <= 10
