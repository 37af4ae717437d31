"""Losses of a torch model: the values known of shared models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.text.windows import text_windows


def test_known_perplexities(shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """The measured values that came with the shared models, by their protocol: full, and without single layers."""
    known = {"stories260k": (4.27, [102, 14.6, 9.09, 9.74, 10.1]), "babyllama-361": (2.20, [30.3, 21.4, 9.49, 8.77, 4.81])}
    for name, (full, without) in known.items():
        folder = shared_model(name)
        model = load_model(folder)
        windows = text_windows(tinystories, folder, budget=16000)
        assert np.exp(mean_loss(model, windows)) == pytest.approx(full, rel=2e-3)
        for index, value in enumerate(without):
            with Blocks(model).without([index]):
                assert np.exp(mean_loss(model, windows)) == pytest.approx(value, rel=2e-2)
