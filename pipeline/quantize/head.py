"""Which rows of the output head get few bits: those of tokens that are seldom likely.

A quarter to two thirds of a small model is its vocabulary, and most of that belongs to tokens that hardly ever come. What an error
d of a token's logit costs is, to second order, p (1 - p) d^2 / 2 nats, p its probability: the first ninth of SmolLM2's rows has
four fifths of that, and the others may have 4 bits for a fourth to two fifths of what 4 bits everywhere cost
(docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.packed import FEW_BITS, LEAST_ROWS, MOST_PARTS
from edgepress.pipeline.metrics.torch_scores import in_cache
from edgepress.pipeline.options import rows_of
from edgepress.pipeline.quantize.mix import Form, bytes_of
from edgepress.pipeline.quantize.rtn import round_to_nearest

# What the tokens with few bits may cost together, as shares of what those of all tokens would.
SHARES = (0.2, 0.1, 0.05, 0.02)
# Pieces that a vocabulary is looked at in: tokens beside one another came to be at about the same time of its making.
_PIECES = 256
# A part costs an operator and a few look-ups: about what so many pieces save.
_PART = 2.0
_HALVINGS = 40


class Head(NamedTuple):
    """Bits of the output head; rare: ranges of its rows that have ``FEW_BITS``, as ``--rare-rows`` takes them."""

    bits: int
    rare: tuple[str, ...] = ()

    def parts(self, rows: int) -> list[tuple[slice, int]]:
        """All rows in order, in runs of the same bits."""
        found, begin = [], 0
        for few in rows_of(self.rare):
            found += [(slice(begin, few.start), self.bits), (few, FEW_BITS)]
            begin = few.stop
        return [part for part in [*found, (slice(begin, rows), self.bits)] if part[0].stop > part[0].start]

    def mean_bits(self, rows: int) -> float:
        """Bits of a weight, without scales and zero points."""
        return sum((part.stop - part.start) * bits for part, bits in self.parts(rows)) / rows if rows else float(self.bits)

    def bytes(self, rows: int, columns: int, group_size: int) -> int:
        """As they are stored: no zero points at 8 bits."""
        return sum(
            bytes_of(part.stop - part.start, columns, Form(bits, group_size), symmetric=bits == 8)
            for part, bits in self.parts(rows)
        )


EIGHT_BITS, FOUR_BITS = Head(8), Head(4)


def group_of(width: int, longest: int) -> int | None:
    """Weights with a common scale in embedding and head, None where they stay float: it divides the width, for both read it."""
    return next((size for size in (128, 64, 32, 16) if size <= longest and width and width % size == 0), None)


def weights_of_tokens(blocks: Blocks, windows: Iterable[np.ndarray]) -> np.ndarray:
    """How much an error of each token's logit costs over some texts, float64 (vocabulary,), of sum 1."""
    total = np.zeros(1)
    for ids in windows:
        hidden = blocks.states(torch.from_numpy(ids)[None], [len(blocks)])[len(blocks)][0]
        for _, logits in blocks.heads(hidden):
            sums = torch.zeros(logits.shape[-1], dtype=torch.float64)
            for few in in_cache(logits):
                likely = torch.softmax(few.float(), -1)
                sums += likely.mul_(1 - likely).sum(0)
            total = total + sums.numpy()
            del logits, few
    weights: np.ndarray = total / total.sum()
    return weights


def rare_rows(weights: np.ndarray, share: float) -> tuple[str, ...]:
    """Ranges of as many rows as together have at most this share of the weights (vocabulary,), few ranges and long ones.

    Least weight for rows of 8 bits, whose price is raised as far as the share allows; what a part costs keeps them together. ()
    where there are none.
    """
    size = max(LEAST_ROWS, -(-len(weights) // _PIECES // LEAST_ROWS) * LEAST_ROWS)
    if len(weights) < 2 * size:
        return ()
    begins = np.arange(0, len(weights) // size * size, size)  # the last piece is longer
    lost, rows = np.add.reduceat(weights, begins), np.diff([*begins, len(weights)]) / len(weights)
    low, high, found = -30.0, 30.0, np.zeros(len(begins), dtype=bool)
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        few = _split(lost, np.exp(price) * rows, _PART * np.exp(price) * float(rows[0]))
        if lost[few].sum() <= share and np.count_nonzero(np.diff(few)) < MOST_PARTS:
            low, found = price, few
        else:
            high = price
    if not found.any() or found.all():
        return ()
    edges = [0, *(np.flatnonzero(np.diff(found)) + 1).tolist(), len(found)]
    ends = [*begins.tolist(), len(weights)]
    return tuple(f"{ends[first]}-{ends[last] - 1}" for first, last in pairwise(edges) if found[first])


def _split(few: np.ndarray, many: np.ndarray, switch: float) -> np.ndarray:
    """Which pieces get few bits, bool (pieces,): least sum of either cost and of the switches between them (Viterbi)."""
    best, came = np.zeros(2), []
    for costs in zip(many.tolist(), few.tolist(), strict=True):
        changed = best[::-1] + switch
        came.append(changed < best)
        best = np.minimum(best, changed) + costs
    state, states = int(best.argmin()), []
    for taken in reversed(came):
        states.append(state == 1)
        state = 1 - state if taken[state] else state
    return np.array(states[::-1])


@contextmanager
def rounded_head(module: torch.nn.Module, head: Head, group_size: int) -> Iterator[None]:
    """Within the context the head has the weights that rounding leaves; a tied embedding has them, too.

    group_size: the longest; one that divides the width is taken, as ``pack`` does.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    group_size = group_of(weight.shape[1], group_size) or group_size
    former = weight.detach().clone()
    try:
        with torch.no_grad():
            for rows, bits in head.parts(len(former)):
                restored = round_to_nearest("head", former[rows], bits, group_size, symmetric=bits == 8).dequantized()
                weight[rows] = torch.from_numpy(restored)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(former)


def candidates(weights: np.ndarray, shares: Sequence[float] = SHARES) -> dict[Head, float]:
    """Heads with few bits for rows of at most such shares of the weights (vocabulary,), with the share that they have.

    Fewest bytes first, each once.
    """
    heads = [Head(8, rows) for rows in dict.fromkeys(rare_rows(weights, share) for share in shares) if rows]
    return {head: float(sum(weights[rows].sum() for rows in rows_of(head.rare))) for head in heads}
