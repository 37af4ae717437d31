"""Each way of choosing layers does what it says, measured without the shortcuts that make it fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune import criteria
from edgepress.pipeline.prune.criteria import Choice, Search, choose, kl_without
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.text.windows import text_windows

OPTIONS = PruneOptions(remove_count=2, calibration=CALIBRATION_TEXT, calibration_tokens=600, greedy_tokens=300)


class Setting:
    """The reference model and windows that rank and judge."""

    def __init__(self, folder: Path) -> None:
        self.blocks = Blocks(load_model(folder))
        windows = text_windows(CALIBRATION_TEXT, folder, budget=600, length=100)
        self.ranking, self.held_out = windows[:4], windows[4:]
        self.influence = measure_influence(self.blocks, self.ranking, [1, 2, 3])

    def choose(self, **changes: object) -> Choice:
        """The choice under changed options."""
        options = replace(OPTIONS, **changes).resolved()
        return choose(options, options.amount(16), self.blocks, self.influence, self.ranking, self.held_out)


@pytest.fixture(scope="module")
def setting(reference: Path) -> Setting:
    return Setting(reference)


def hooked_logits(model: torch.nn.Module, ids: np.ndarray, removed: list[int]) -> np.ndarray:
    """Logits with the output of the removed blocks replaced by their input, computed in full."""
    handles = [model.model.layers[i].register_forward_hook(lambda m, args, output: args[0]) for i in removed]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
    for handle in handles:
        handle.remove()
    return torch.log_softmax(logits, -1).numpy()


def naive_kl(model: torch.nn.Module, windows: list[np.ndarray], removed: list[int]) -> float:
    per_token = []
    for ids in windows:
        p, q = hooked_logits(model, ids, []), hooked_logits(model, ids, removed)
        per_token += list((np.exp(p) * (p - q)).sum(-1))
    return float(np.mean(per_token))


def test_bi_takes_the_lowest(setting: Setting) -> None:
    order = np.argsort(setting.influence.block_influence)
    assert setting.choose(criterion="bi").removed == sorted(order[:2].tolist())


def test_angular_takes_the_best_run(setting: Setting) -> None:
    first = int(np.argmin(setting.influence.angular_distance(3)))
    assert setting.choose(criterion="angular", remove_count=3).removed == [first, first + 1, first + 2]


def test_list_takes_what_it_is_told(setting: Setting) -> None:
    assert setting.choose(remove_count=None, remove_layers=(9, 3)).removed == [3, 9]


def test_greedy_costs_are_the_divergences_of_whole_passes(setting: Setting) -> None:
    """The figures that greedy chose by, which start from recorded states, equal those computed in full with hooks."""
    choice = setting.choose(criterion="greedy", shortlist=3)
    used = setting.ranking[:3]  # the first windows that hold greedy_tokens
    removed: list[int] = []
    for entry in choice.rounds:
        for index, cost in entry.kl.items():
            assert cost == pytest.approx(naive_kl(setting.blocks.model, used, [*removed, index]), abs=2e-6)
        removed.append(entry.removed)
        assert entry.kl[entry.removed] == min(entry.kl.values())
    assert choice.evaluations >= 6
    assert choice.seconds > 0


def test_greedy_is_never_costlier_than_bi_or_angular(setting: Setting) -> None:
    """On the text it chose by, whatever the greedy path missed: the other criteria's sets are tried too."""
    for amount in (2, 3):
        costs = [
            kl_without(
                setting.blocks, [setting.choose(criterion=name, remove_count=amount, shortlist=1).removed], setting.ranking[:3]
            )
            for name in ("greedy", "bi", "angular")
        ]
        assert costs[0] <= min(costs[1:])


@pytest.mark.parametrize("criterion", ["bi", "angular", "greedy"])
def test_a_limit_is_kept_on_held_out_text(criterion: str, setting: Setting) -> None:
    """The set taken is within the limit, the next one of the path is not."""
    influence = measure_influence(setting.blocks, setting.ranking, range(1, 16))
    options = replace(OPTIONS, remove_count=None, max_loss=0.06, criterion=criterion, shortlist=2)
    choice = choose(options, options.amount(16), setting.blocks, influence, setting.ranking, setting.held_out)
    *within, _ = choice.path
    assert within and choice.removed == within[-1].layers
    before = mean_loss(setting.blocks.model, setting.held_out)
    for step in choice.path:
        with setting.blocks.without(step.layers):
            growth = mean_loss(setting.blocks.model, setting.held_out) - before
        moved = step.kl is not None and step.kl > 0.06
        assert step.loss_growth == (None if moved else pytest.approx(growth, abs=1e-5))
    costs = [max(step.loss_growth or 0.0, step.kl or 0.0) for step in choice.path]
    assert max(costs[:-1]) <= 0.06 < costs[-1]
    assert [step.kl is not None for step in choice.path] == [criterion == "greedy"] * len(choice.path)


def test_a_text_that_the_model_knows_badly_hides_nothing(setting: Setting) -> None:
    """Of what it cannot predict it loses little without a layer; that it predicts otherwise counts as well."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(5, 400, len(row)) for row in setting.held_out]
    options = replace(OPTIONS, remove_count=1, criterion="greedy", shortlist=2)

    def limited(limit: float) -> Choice:
        return choose(replace(options, max_loss=limit), 1, setting.blocks, setting.influence, setting.ranking, noise)

    (step,) = limited(9.0).path
    assert step.kl is not None and step.loss_growth is not None and step.kl > max(0.0, step.loss_growth) + 1e-3
    between = (max(0.0, step.loss_growth) + step.kl) / 2
    assert limited(between).removed == [] and limited(step.kl + 1e-3).removed == step.layers


@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_no_number_keeps_to_no_limit(bad: int, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either text."""
    texts = [setting.held_out[:1], setting.held_out[1:2]]
    losses = {id(windows): float("nan") if number == bad else 1.0 for number, windows in enumerate(texts)}
    monkeypatch.setattr(criteria, "mean_loss", lambda _, windows: losses[id(windows)])
    search = Search(setting.blocks, setting.influence, setting.ranking, [], 1)
    removed, path = criteria._within(9.0, iter([[3]]), search, texts)
    assert removed == [] and len(path) == 1


def test_a_limit_too_tight_removes_nothing(setting: Setting) -> None:
    assert setting.choose(criterion="bi", remove_count=None, max_loss=0.0).removed == []


def test_an_amount_caps_a_limit(setting: Setting) -> None:
    assert len(setting.choose(criterion="bi", remove_count=1, max_loss=9.0).removed) == 1
