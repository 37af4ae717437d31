"""Which channels of a block go, and what the others must then carry: Optimal Brain Surgeon on the matrix that reads them.

A channel's price is what removing it adds to the squared error of the block's output when all other columns of the matrix adjust
(Hassibi and Stork 1993; Frantar and Alistarh 2022, section 4, for whole columns as in ZipLM, Kurtic et al. 2023, section 3). Blocks
are taken in order, and each is fitted on the stream that the blocks before it, narrowed, really give, towards the stream of the
whole model: a later block corrects what earlier ones left.
"""

from __future__ import annotations

import math

import torch
from edgepress.pipeline.checkpoint.least_squares import Sums

RIDGE = 0.1  # times the Gram matrix's diagonal
ROUNDS = 16  # in which the channels of a block go; prices are reckoned anew between them


def least(statistics: Sums, weight: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices in order of the ``kept`` channels to keep. weight: (hidden, width) of the matrix that reads them."""
    width = weight.shape[1]
    inverse = torch.linalg.inv(_ridged(statistics.gram))
    weight, left = weight.double().clone(), torch.arange(width)
    while len(left) > kept:
        count = min(len(left) - kept, math.ceil((width - kept) / ROUNDS))
        prices = weight.square().sum(0) / inverse.diagonal()
        gone = torch.zeros(len(left), dtype=torch.bool)
        gone[prices.argsort()[:count]] = True
        # Block elimination: the others take over what goes, and their inverse is that of what is left.
        solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight = (weight - weight[:, gone] @ solved)[:, ~gone]
        inverse = (inverse - inverse[:, gone] @ solved)[~gone][:, ~gone]
        left = left[~gone]
    return left


def refit(statistics: Sums, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The matrix (hidden, kept) that makes up for the channels that go and for what the stream lacks, by ridge regression.

    weight: (hidden, width) before.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    gram = _ridged(statistics.gram[kept][:, kept])
    wanted = statistics.missing[kept] + statistics.gram[kept][:, gone] @ weight[:, gone].double().T
    found: torch.Tensor = weight[:, kept] + torch.linalg.solve(gram, wanted).T.to(weight)
    return found


def _ridged(gram: torch.Tensor) -> torch.Tensor:
    """With a ridge in proportion to each channel's own size: one that is a thousand times as loud must not hold others still."""
    diagonal = gram.diagonal()
    return gram + torch.diag(RIDGE * diagonal + 1e-9 * diagonal.mean().clamp_min(1e-30))
