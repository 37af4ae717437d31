"""Drawing tokens: the distribution is that of transformers, and what a model's own settings ask for is obeyed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import write_json
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.runtime.sampler import Sampler, Sampling, own_sampling, with_wishes
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOGITS = np.random.default_rng(0).normal(scale=3, size=300).astype(np.float32)
TEXT = [5, 7, 7, 290, int(LOGITS.argmax()), int(LOGITS.argmin())]


def sampler(sampling: Sampling, seed: int = 0, likeliest: int | None = None) -> Sampler:
    return Sampler(sampling, np.random.default_rng(seed), TEXT, likeliest)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=17),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, min_p=0.05),
        Sampling(0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
        Sampling(1.0, top_p=0.0001),
        Sampling(1.0, top_k=1000),
    ],
)
def test_the_distribution_is_that_of_transformers(sampling: Sampling) -> None:
    """Penalty, temperature, top-k, top-p and min-p, in its order."""
    ids, scores = torch.tensor([TEXT]), torch.from_numpy(LOGITS.copy())[None]
    steps = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty), TemperatureLogitsWarper(sampling.temperature)]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for step in steps:
        scores = step(ids, scores)
    theirs = scores[0].double().softmax(-1).numpy()
    choose = sampler(sampling)
    weights = choose.weights(choose._moved(LOGITS))
    mine = weights / weights.sum()
    assert np.array_equal(mine > 0, theirs > 0)
    assert np.allclose(mine, theirs, atol=1e-6)


def test_tokens_are_drawn_as_likely_as_that() -> None:
    """Four thousand draws."""
    choose = sampler(Sampling(1.0, top_k=5))
    counts = np.bincount([choose(LOGITS) for _ in range(4000)], minlength=300) / 4000
    weights = choose.weights(LOGITS)
    assert np.abs(counts - weights / weights.sum()).max() < 0.03 and (counts > 0).sum() == 5


def test_the_likeliest_token_needs_no_chance() -> None:
    """Greedy tokens know penalties and bias, too: of what was generated, and not of the prompt."""
    best, second = np.argsort(-LOGITS)[:2].tolist()
    assert sampler(Sampling())(LOGITS) == best
    assert sampler(Sampling(bias={second: 50.0}))(LOGITS) == second
    assert sampler(Sampling(repetition_penalty=5.0))(LOGITS) == second
    choose = sampler(Sampling(presence_penalty=2 * float(LOGITS[best] - LOGITS[second])))
    assert [choose(LOGITS), choose(LOGITS)] == [best, second]
    choose = sampler(Sampling(frequency_penalty=0.6 * float(LOGITS[best] - LOGITS[second])))
    assert [choose(LOGITS) for _ in range(3)] == [best, best, second]
    assert LOGITS.argmax() == best  # nothing was written into the logits


def test_logarithms_of_probabilities_are_the_models_own() -> None:
    """Whatever temperature and bias draw by."""
    choose = sampler(Sampling(2.0, bias={3: 9.0}), likeliest=4)
    tokens = [choose(LOGITS) for _ in range(20)]
    logs = torch.from_numpy(LOGITS).double().log_softmax(-1).numpy()
    assert np.allclose([value for value, _ in choose.noted], logs[tokens])
    for _, best in choose.noted:
        assert list(best) == np.argsort(-LOGITS)[:4].tolist() and np.allclose(list(best.values()), np.sort(logs)[::-1][:4])


def test_a_models_own_settings(tmp_path: Path) -> None:
    """Without do_sample transformers takes the likeliest token; with it top_k is 50 where none is given."""
    assert own_sampling(tmp_path) == Sampling()
    write_json(tmp_path / "generation_config.json", {"temperature": 0.6, "repetition_penalty": 1.1})
    assert own_sampling(tmp_path) == Sampling(repetition_penalty=1.1)
    write_json(tmp_path / "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None})
    own = own_sampling(tmp_path)
    assert own == Sampling(0.6, top_k=50, top_p=0.9)
    assert with_wishes(own, RunOptions(temperature=0.0, top_k=0)) == Sampling(0.0, top_p=0.9)
    assert with_wishes(own, RunOptions()) == own
    for wrong in ({"top_p": 3}, {"temperature": "hot"}, {"top_k": True}, {"repetition_penalty": 0}):
        write_json(tmp_path / "generation_config.json", {"do_sample": True, **wrong})
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*, it must be a number from"):
            own_sampling(tmp_path)
