"""Which rows of the head get few bits: those of tokens that are seldom likely, in few and long ranges."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import LEAST_ROWS, MOST_PARTS
from edgepress.pipeline.options import rows_of
from edgepress.pipeline.quantize.head import EIGHT_BITS, Head, candidates, rare_rows, rounded_head, weights_of_tokens
from edgepress.pipeline.quantize.rtn import round_to_nearest

ZIPF = 1 / np.arange(1, 20_001)
ZIPF /= ZIPF.sum()
# As SentencePiece has them: words by frequency, single characters behind all of them
CHARACTERS_LAST = np.concatenate([ZIPF[500:], ZIPF[:500]])


@pytest.mark.parametrize("share", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("weights", [ZIPF, CHARACTERS_LAST], ids=["by rank", "characters last"])
def test_rare_rows_are_most_of_a_vocabulary_and_little_of_a_text(weights: np.ndarray, share: float) -> None:
    found = rows_of(rare_rows(weights, share))
    taken = np.concatenate([np.arange(rows.start, rows.stop) for rows in found])
    cheapest = np.cumsum(np.sort(weights))  # of single rows, wherever they lie
    assert 0.6 * share < weights[taken].sum() <= share
    assert len(taken) > 0.85 * np.searchsorted(cheapest, weights[taken].sum())
    assert len(found) <= 2


def test_ranges_are_few_and_long_whatever_the_weights() -> None:
    """Each costs an operator: noise must not make a comb of them."""
    dice = np.random.default_rng(0)
    for size in (300, 5119, 50_257):
        for weights in (dice.exponential(size=size), dice.exponential(size=size) ** 4, np.ones(size)):
            for share in (0.5, 0.1):
                found = rows_of(rare_rows(weights / weights.sum(), share))
                assert 2 * len(found) - 1 < MOST_PARTS
                assert all(rows.stop - rows.start >= LEAST_ROWS and rows.stop <= size for rows in found)
                assert all(b.start - a.stop >= LEAST_ROWS for a, b in pairwise(found))


def test_candidates_go_from_few_bytes_to_many() -> None:
    heads = candidates(ZIPF)
    sizes = [head.bytes(20_000, 64, 64) for head in heads]
    assert len(heads) == 4 and sizes == sorted(sizes) and sizes[-1] < EIGHT_BITS.bytes(20_000, 64, 64)
    assert list(heads.values()) == sorted(heads.values(), reverse=True)
    assert candidates(np.full(20, 0.05)) == {}  # too few to tell apart


def test_bytes_and_bits_are_of_all_rows() -> None:
    head = Head(8, ("40-99", "150-199"))
    assert [(rows.start, rows.stop, bits) for rows, bits in head.parts(200)] == [
        (0, 40, 8),
        (40, 100, 4),
        (100, 150, 8),
        (150, 200, 4),
    ]
    assert head.mean_bits(200) == pytest.approx((90 * 8 + 110 * 4) / 200)
    eight, four = (round_to_nearest("m", np.ones((n, 64), np.float32), bits, 32, bits == 8) for n, bits in ((90, 8), (110, 4)))
    assert head.bytes(200, 64, 32) == eight.nbytes + four.nbytes


def test_weights_are_what_an_error_of_a_logit_costs(tiny: Path) -> None:
    """To second order: the loss of a text whose logits of one token are moved to and fro."""
    model, ids = Checkpoint(tiny).model(), np.arange(40, 100)
    weights = weights_of_tokens(Blocks(model), [ids])
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None]).logits[0].double()
    before, costs = torch.log_softmax(logits, -1), []
    some = np.argsort(weights)[[-1, -5, -50, -500]]
    for token in some:
        moved = logits.clone()
        moved[:, token] += 0.01
        costs.append(float((before.exp() * (before - torch.log_softmax(moved, -1))).sum(-1).mean()))
    assert np.allclose(np.array(costs) / costs[0], weights[some] / weights[some[0]], rtol=0.02)


def test_a_head_is_rounded_and_comes_back(tiny: Path) -> None:
    module = Checkpoint(tiny).model().get_output_embeddings()
    former = module.weight.detach().clone()
    with rounded_head(module, Head(8, ("100-299",)), 32):
        error = (module.weight - former).abs().mean(1)
        assert error[100:300].min() > 4 * error[:100].max()
    assert torch.equal(module.weight, former)


def test_a_head_is_measured_in_the_groups_that_are_stored() -> None:
    """Its width decides them: none that it does not divide into."""
    module = torch.nn.Linear(96, 64, bias=False)
    former = module.weight.detach().numpy().copy()
    with rounded_head(module, EIGHT_BITS, 64):
        stored = round_to_nearest("head", former, 8, 32, symmetric=True).dequantized()
        assert np.array_equal(module.weight.detach().numpy(), stored)
