"""Ridge regression from sums: the solution is that of all rows at once, and the sums stay as they were."""

from __future__ import annotations

import pytest
import torch
from edgepress.pipeline.checkpoint.least_squares import Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_strength_is_solved_from_the_same_sums(dtype: torch.dtype) -> None:
    """One after the other, as heal tries them: a strength must not add to the next."""
    torch.manual_seed(0)
    entering, missing, weights = torch.randn(200, 12), torch.randn(200, 5), torch.rand(200, 1)
    sums = Sums.empty(12, 5, dtype)
    for part in (slice(0, 90), slice(90, 200)):
        sums.add(entering[part], missing[part], weights[part])
    before = sums.gram.clone()
    x, y = (entering * weights).double(), (missing * weights).double()
    gram = x.T @ x
    for ridge in (0.001, 0.1, 1.0, 0.001):
        strength = ridge * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(sums.solved(ridge), torch.linalg.solve(gram + strength, x.T @ y), rtol=1e-4, atol=1e-5)
    assert torch.equal(sums.gram, before)
