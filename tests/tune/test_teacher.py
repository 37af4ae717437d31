"""Predictions on file, and the divergence from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import divergences
from edgepress.pipeline.tune.teacher import divergence, mean_divergence, record


def likeliest(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    best, tokens = torch.log_softmax(logits, -1).topk(top)
    return tokens, best


def test_with_every_token_it_is_the_divergence() -> None:
    torch.manual_seed(0)
    original, student = 3 * torch.randn(2, 40, 50)
    assert divergence(student, *likeliest(original, 50)) == pytest.approx(divergences(original, student).numpy(), abs=2e-5)


def test_with_few_tokens_it_is_less_and_falls_with_the_divergence() -> None:
    torch.manual_seed(0)
    original, noise = 6 * torch.randn(40, 500), torch.randn(40, 500)
    whole, merged = (
        [float(f(original + s * noise).mean()) for s in (0.0, 0.1, 0.5, 1.0)]
        for f in (lambda x: divergences(original, x), lambda x: divergence(x, *likeliest(original, 128)))
    )
    assert merged == sorted(merged) and merged[0] == pytest.approx(0, abs=1e-5)
    assert all(0.8 * a - 1e-5 <= b <= a + 1e-5 for a, b in zip(whole, merged, strict=True))


def by_autograd(logits: torch.Tensor, tokens: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """The definition, as torch differentiates it."""
    scores = torch.log_softmax(logits, -1).gather(-1, tokens)
    rest, student_rest = 1 - logs.exp().sum(-1), 1 - scores.exp().sum(-1)
    return (logs.exp() * (logs - scores)).sum(-1) + rest * (rest.log() - student_rest.log())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_closed_gradient_is_that_of_the_definition(kind: torch.dtype) -> None:
    """More positions than are in memory at once, each with a weight of its own."""
    torch.manual_seed(0)
    original, student = 2 * torch.randn(300, 200), (2 * torch.randn(300, 200)).to(kind)
    weights, predictions = torch.rand(300), likeliest(original, 50)
    gradients = []
    for function in (by_autograd, divergence):
        logits = student.clone().float() if function is by_autograd else student.clone()
        logits.requires_grad_()
        values = function(logits, *predictions)
        (values * weights).sum().backward()
        gradients.append((values.detach(), logits.grad.float()))  # type: ignore[union-attr]
    (expected, wanted), (values, gradient) = gradients
    assert torch.allclose(values, expected, atol=1e-5)
    assert torch.allclose(gradient, wanted, atol=1e-6 if kind == torch.float32 else 4e-3)


def test_predictions_are_recorded_once(tiny: Path, tmp_path: Path) -> None:
    """In order, windows of unequal length included; whole files are not computed again; a model does not depart from itself."""
    model = Checkpoint(tiny).model()
    windows = [np.arange(1, 30), np.arange(40, 52), np.arange(100, 129)]
    predictions = record(model, windows, tmp_path / "p")
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=torch.from_numpy(windows[1])[None]).logits[0], -1)
    tokens, logs = predictions.at(slice(29, 41), torch.device("cpu"))
    assert torch.allclose(scores.gather(-1, tokens), logs, atol=1e-5)
    assert mean_divergence(model, windows, predictions) == pytest.approx(0, abs=1e-5)
    model.forward = None  # whoever asks it again fails
    again = record(model, windows, tmp_path / "p")
    assert np.array_equal(again.tokens, predictions.tokens) and np.array_equal(again.logs, predictions.logs)
