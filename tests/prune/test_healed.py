"""The choice by what a removal costs after healing: judged as the model then is, and the model is as it was when all is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import divergences, logits_of, mean_loss
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune import healed as trials
from edgepress.pipeline.prune.criteria import Choice, Search, choose, healed
from edgepress.pipeline.prune.healed import RIDGE, HealedTrials
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.prune.trials import Trials
from edgepress.pipeline.text.windows import text_windows
from families import TINY
from transformers import Gemma2Config

OPTIONS = PruneOptions(
    criterion="healed", remove_count=3, calibration=CALIBRATION_TEXT, calibration_tokens=6000, greedy_tokens=400, shortlist=3
)


class Setting:
    """The reference model, its weights as they were, and windows to judge and to learn from."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.blocks, self.windows = Blocks(self.model), text_windows(CALIBRATION_TEXT, folder, budget=6000, length=100)
        self.judging, self.fitting, self.held_out = self.windows[:4], self.windows[4:50], self.windows[50:]
        self.other = text_windows(OTHER_TEXT, folder, budget=1600, length=100)
        self.influence = measure_influence(self.blocks, self.judging)
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def search(self, shortlist: int) -> Search:
        """What ``healed`` takes."""
        return Search(self.blocks, self.influence, self.judging, self.fitting, shortlist)

    def untouched(self) -> bool:
        """Whether every weight is as it was."""
        return all(torch.equal(value, self.weights[name]) for name, value in self.model.state_dict().items())

    def kl(self, removed: list[int]) -> float:
        """KL(as it was || as it is now without ``removed``), window by window, nothing shared."""
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        with self.blocks.without(removed):
            rows = [torch.from_numpy(logits_of(self.model, row)) for row in self.judging]
        self.model.load_state_dict(self.weights)
        kl = [divergences(torch.from_numpy(logits_of(self.model, w)), row) for w, row in zip(self.judging, rows, strict=True)]
        self.model.load_state_dict(now)
        return float(torch.cat(kl).double().mean())


@pytest.fixture(scope="module")
def setting(reference: Path) -> Setting:
    return Setting(reference)


def test_the_figures_are_those_of_the_healed_model(setting: Setting) -> None:
    """What a trial said is what the model then has, removal upon removal, and far less than unhealed; then all is put back."""
    search = setting.search(3)
    for removed in healed(search, 3):
        best, costs = search.rounds[-1].removed, search.rounds[-1].kl
        assert (
            best in removed and costs[best] == min(costs.values()) and len(costs) == 3 and search.rounds[-1].healed == sorted(costs)
        )
        assert costs[best] == pytest.approx(setting.kl(removed), rel=1e-3)
    assert setting.untouched()
    found = [entry.kl[entry.removed] for entry in search.rounds]
    assert len(found) == 3 and found == sorted(found) and found[-1] < 0.7 * setting.kl(removed)


def test_the_change_is_the_ridge_solution(setting: Setting) -> None:
    """Against one solved from all rows at once: X of what enters the down projection, Y of what the removed block added."""
    found = HealedTrials(setting.blocks, setting.judging, setting.fitting).changes([], [5])[5]
    assert found.matrix is setting.model.get_submodule("model.layers.4.mlp.down_proj")
    rows, wanted = list[np.ndarray](), list[np.ndarray]()
    box = list[torch.Tensor]()
    hook = found.matrix.register_forward_pre_hook(lambda _, args: box.append(args[0]))
    for ids in setting.fitting:
        states = setting.blocks.states(torch.from_numpy(ids)[None], [5, 6])
        weights = 1 / states[6][0].norm(dim=-1, keepdim=True)
        rows.append((box[-1][0] * weights).double().numpy())
        wanted.append(((states[6] - states[5])[0] * weights).double().numpy())
    hook.remove()
    x, y = np.concatenate(rows), np.concatenate(wanted)
    gram = x.T @ x
    solved = np.linalg.solve(gram + RIDGE * gram.diagonal().mean() * np.eye(len(gram)), x.T @ y)
    assert np.allclose(found.added.numpy(), solved, atol=1e-3 * np.abs(solved).max())


def limited(setting: Setting, limit: float, criterion: str) -> Choice:
    """The choice under a limit, on two kinds of text."""
    options = replace(OPTIONS, criterion=criterion, remove_count=None, max_loss=limit)
    text, other = setting.judging + setting.fitting, (setting.other[:8], setting.other[8:])
    return choose(options, options.amount(16), setting.blocks, setting.influence, text, setting.held_out, other)


def test_an_early_end_puts_all_back(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the first set exceeds, and a caller that leaves while it looks at a set."""
    monkeypatch.setattr(trials, "HOPELESS", float("inf"))
    choice = limited(setting, 1e-9, "healed")
    assert choice.removed == [] and len(choice.path) == 1 and choice.rounds[0].healed and setting.untouched()
    found = healed(setting.search(1), 3)
    next(found)
    assert not setting.untouched()
    found.close()
    assert setting.untouched()


def test_what_healing_cannot_save_is_not_healed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit far below what the cheapest removal costs as it goes; one that is near to that is judged healed."""
    changes, solved = HealedTrials.changes, list[list[int]]()

    def counted(self: HealedTrials, removed: list[int], candidates: list[int]) -> dict[int, object]:
        solved.append(candidates)
        return changes(self, removed, candidates)  # type: ignore[return-value]

    monkeypatch.setattr(HealedTrials, "changes", counted)
    choice = limited(setting, 0.001, "healed")
    (round_,), cost = choice.rounds, choice.path[0].kl
    assert choice.removed == [] and not solved and round_.healed == [] and cost == min(round_.kl.values())
    as_it_goes = Trials(setting.blocks, [*setting.judging[:2], *setting.other[:2]]).costs([], [round_.removed], "")
    assert cost == pytest.approx(as_it_goes[round_.removed], rel=1e-3)
    assert choice.evaluations == 3
    near = limited(setting, cost / 4, "healed")
    assert near.evaluations == 6 * len(near.rounds)  # as they go, and healed
    assert solved and near.rounds[0].healed and near.rounds[0].kl[near.rounds[0].removed] < cost
    assert setting.untouched()


def test_a_limit_speaks_of_the_healed_model(setting: Setting) -> None:
    """On both texts, whichever loses more; and on the calibration's kind that is less than without healing.

    Against the model as it was, though that is measured when the first set is healed already.
    """
    choice = limited(setting, 0.04, "healed")
    texts = setting.held_out, setting.other[8:]
    before = [mean_loss(setting.blocks, windows) for windows in texts]
    search = setting.search(3)
    search.windows, search.fitting = [*setting.judging[:2], *setting.other[:2]], setting.windows[2:18]
    with closing(healed(search, 1)) as sets:
        last = next(sets)
        with setting.blocks.without(last):
            after = [mean_loss(setting.blocks, windows) for windows in texts]
    with setting.blocks.without(last):
        assert after[0] < mean_loss(setting.blocks, setting.held_out)
    growths = [b - a for a, b in zip(before, after, strict=True)]
    assert choice.path[0].layers == last and choice.path[0].loss_growth == pytest.approx(max(growths), abs=1e-4)


def test_what_cannot_be_healed_is_judged_as_it_goes(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """A norm behind every matrix (Gemma 2): the same choice and the same figures as greedy's, and so it is recorded."""
    folder = random_model(Gemma2Config(**TINY, head_dim=16), tmp_path / "gemma2")
    blocks, windows = Blocks(load_model(folder)), text_windows(CALIBRATION_TEXT, folder, budget=2000, length=100)
    influence = measure_influence(blocks, windows[:4], [2])
    found = {}
    for criterion in ("healed", "greedy"):
        options = replace(OPTIONS, criterion=criterion, remove_count=1)
        found[criterion] = choose(options, 1, blocks, influence, windows[:10], windows[10:])
    ours, theirs = found["healed"].rounds[0].kl, found["greedy"].rounds[0].kl
    assert found["healed"].criterion == "greedy" and found["healed"].rounds[0].healed == []
    assert found["healed"].removed == found["greedy"].removed and ours == pytest.approx(theirs, rel=1e-3)
