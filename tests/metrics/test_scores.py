"""The same figures in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edgepress.pipeline import machine
from edgepress.pipeline.metrics import scores
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import divergences, next_token_losses, perplexity


def test_numpy_and_torch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and divergences of random logits, over more positions than either takes at once, in their order."""
    monkeypatch.setattr(machine, "_IN_CACHE", 50 * 7)
    monkeypatch.setattr(scores, "cores", lambda: 3)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 300)
    original, logits = (rng.normal(size=(300, 50)).astype(np.float32) for _ in range(2))
    quality = Quality()
    quality.add(ids, logits, original)
    losses = next_token_losses(torch.from_numpy(logits[:-1]), torch.from_numpy(ids[1:]))
    kl = divergences(torch.from_numpy(original[:-1]), torch.from_numpy(logits[:-1]))
    assert np.concatenate(quality.losses) == pytest.approx(losses.numpy(), abs=1e-5)
    assert np.concatenate(quality.divergences) == pytest.approx(kl.numpy(), abs=1e-5)
    figures = quality.figures()
    assert figures["tokens"] == 299 and figures["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert figures["kl_standard_error"] == pytest.approx(kl.numpy().std() / np.sqrt(299), rel=1e-4)
    assert figures["top1_agreement"] == np.mean(original[:-1].argmax(-1) == logits[:-1].argmax(-1))


def test_as_exact_as_float64() -> None:
    """To a ten-millionth of a nat, also of a token that is hardly likely: what float32 leaves of 60 is 4e-6."""
    rng = np.random.default_rng(0)
    original, logits = (rng.normal(scale=12, size=(64, 5000)).astype(np.float32) for _ in range(2))
    exact = [x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
             for x in (original.astype(np.float64), logits.astype(np.float64))]  # fmt: skip
    following, quality = rng.integers(0, 5000, 64), Quality()
    quality.add_part(following, logits, original)
    expected = -exact[1][np.arange(64), following]
    assert expected.max() > 60 and np.concatenate(quality.losses) == pytest.approx(expected, abs=2e-7)
    assert np.concatenate(quality.changes) == pytest.approx(expected + exact[0][np.arange(64), following], abs=4e-7)
    assert np.concatenate(quality.divergences) == pytest.approx((np.exp(exact[0]) * (exact[0] - exact[1])).sum(-1), abs=1e-5)


def test_a_model_against_itself_differs_by_nothing() -> None:
    """Be it the same array or a copy of it; no rounding is left."""
    logits = np.random.default_rng(0).normal(scale=9, size=(40, 50)).astype(np.float32)
    for original in (logits, logits.copy()):
        quality = Quality()
        quality.add(np.arange(40), logits, original)
        figures = quality.figures()
        assert figures["kl_mean"] == figures["kl_p99"] == 0.0 and figures["top1_agreement"] == 1.0
        assert quality.loss_change() == (0.0, 0.0)


def test_without_an_original_nothing_is_compared() -> None:
    quality = Quality()
    quality.add(np.arange(4), np.zeros((4, 8), dtype=np.float32), None)
    assert quality.figures() == {"perplexity": pytest.approx(8), "tokens": 3}


def test_a_perplexity_is_always_valid_json() -> None:
    assert [perplexity(loss) for loss in (0.0, 800.0, float("nan"))] == [1.0, 1e300, 1e300]
