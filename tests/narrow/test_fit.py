"""Which channels go, and what the others take over, where the answer is known."""

from __future__ import annotations

import torch
from edgepress.pipeline.checkpoint.least_squares import Sums
from edgepress.pipeline.narrow.fit import least, refit


def statistics(channels: torch.Tensor, missing: torch.Tensor) -> Sums:
    found = Sums.empty(channels.shape[1], missing.shape[1])
    found.add(channels, missing, torch.ones(len(channels), 1))
    return found


def test_what_others_can_say_goes_first() -> None:
    """The sum of two others is the loudest of all, and costs nothing; activation times column norm would keep it."""
    torch.manual_seed(0)
    channels = torch.randn(500, 6)
    channels[:, 3] = channels[:, 0] + channels[:, 5]
    weight = torch.randn(4, 6)
    weight[:, 3] *= 3
    found = statistics(channels, torch.zeros(500, 4))
    kept = least(found, weight, 5)
    assert len({0, 3, 5} & set(kept.tolist())) == 2, "one of the three that depend on each other"
    output = channels[:, kept] @ refit(found, weight, kept).T
    assert float((output - channels @ weight.T).norm() / (channels @ weight.T).norm()) < 0.06


def test_what_the_stream_lacks_is_made_up_for() -> None:
    torch.manual_seed(0)
    channels, weight = torch.randn(500, 8), torch.randn(4, 8)
    lacking = channels[:, :6] @ torch.randn(6, 4)
    kept = torch.arange(6)
    plain, told = (refit(statistics(channels, missing), weight, kept) for missing in (torch.zeros(500, 4), lacking))
    wanted = channels @ weight.T + lacking
    errors = [float((channels[:, kept] @ matrix.T - wanted).norm()) for matrix in (plain, told)]
    assert errors[1] < 0.6 * errors[0]
    torch.testing.assert_close(channels[:, kept] @ (told - plain).T, lacking, rtol=0.1, atol=0.2)


def test_a_channel_that_is_never_used() -> None:
    """It goes first, and a Gram matrix with zeros in it is no obstacle."""
    channels = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    channels[:, 2] = 0
    assert least(statistics(channels, torch.zeros(50, 3)), torch.ones(3, 8), 7).tolist() == [0, 1, 3, 4, 5, 6, 7]


def test_a_loud_channel_does_not_hold_the_others_still() -> None:
    """One of a thousand times the size, as trained models have them: fifteen doubles of others can still go for nothing."""
    torch.manual_seed(0)
    base = torch.randn(2000, 16)
    doubles = base[:, :15] + 0.01 * torch.randn(2000, 15)
    channels = torch.cat([base, doubles, 1000 * torch.randn(2000, 1)], dim=1)
    weight = torch.randn(8, 32)
    weight[:, 31] *= 1e-3
    kept = torch.tensor([*range(16), 31])
    found = refit(statistics(channels, torch.zeros(2000, 8)), weight, kept)
    wanted = channels @ weight.T
    assert float((channels[:, kept] @ found.T - wanted).norm() / wanted.norm()) < 0.1
