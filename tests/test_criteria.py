"""Each way of choosing layers does what it says, measured without the shortcuts that make it fast."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.flags import make
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune.criteria import Choice, choose, kl_without
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.recipe import plan, read
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
    choice = setting.choose(shortlist=3)
    used = setting.ranking[:3]  # the first windows that hold greedy_tokens
    removed: list[int] = []
    for entry in choice.rounds[:2]:
        for index, cost in entry["kl"].items():
            assert cost == pytest.approx(naive_kl(setting.blocks.model, used, [*removed, int(index)]), abs=2e-6)
        removed.append(entry["removed"])
        assert entry["kl"][str(entry["removed"])] == min(entry["kl"].values())
    assert choice.evaluations >= 6
    assert choice.seconds > 0


def test_greedy_is_never_costlier_than_bi_or_angular(setting: Setting) -> None:
    """On the text it chose by, whatever the greedy path missed: the other criteria's sets are tried beside it."""
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
    *within, beyond = choice.path
    assert within and choice.removed == within[-1]["layers"]
    before = mean_loss(setting.blocks.model, setting.held_out)
    for entry in choice.path:
        with setting.blocks.without(entry["layers"]):
            growth = mean_loss(setting.blocks.model, setting.held_out) - before
        assert entry["held_out_loss_growth"] == pytest.approx(growth, abs=1e-5)
    assert all(entry["held_out_loss_growth"] <= 0.06 for entry in within) and beyond["held_out_loss_growth"] > 0.06


def test_a_limit_too_tight_removes_nothing(setting: Setting) -> None:
    assert setting.choose(criterion="bi", remove_count=None, max_loss=0.0).removed == []


def test_an_amount_caps_a_limit(setting: Setting) -> None:
    assert len(setting.choose(criterion="bi", remove_count=1, max_loss=9.0).removed) == 1


@pytest.mark.parametrize(("fraction", "layers", "amount"), [(0.1, 16, 1), (0.25, 16, 4), (0.3, 5, 1), (0.1, 4, 1), (0.99, 4, 3)])
def test_a_fraction_rounds_down_and_removes_at_least_one(fraction: float, layers: int, amount: int) -> None:
    assert PruneOptions(remove_fraction=fraction).amount(layers) == amount


def test_every_layer_cannot_go() -> None:
    with pytest.raises(OptionError, match="at most 3"):
        PruneOptions(remove_count=4).amount(4)
    with pytest.raises(OptionError, match="at most 3"):
        PruneOptions(remove_layers=(0, 1, 2, 3)).amount(4)


def test_ways_to_say_what_to_remove_exclude_each_other() -> None:
    ways = [{"remove_count": 2}, {"remove_fraction": 0.1}, {"remove_layers": (1, 2)}]
    for one, other in itertools.combinations(ways, 2):
        with pytest.raises(OptionError):
            make(PruneOptions, one | other)


def test_a_flag_replaces_the_recipes_amount() -> None:
    """The default recipe removes a tenth: neither a list nor a limit on the command line may be capped by that."""
    for flags in ({"remove_layers": "3,4"}, {"max_loss": "0.1"}, {"remove_count": "2"}):
        (_, options), *_ = plan(read("default"), flags)
        assert options.remove_fraction is None
    (_, options), *_ = plan({"prune": {"criterion": "bi", "remove_count": 2}}, {"remove_layers": "3,4"})
    assert (options.resolved().criterion, options.remove_layers) == ("list", (3, 4))


def test_each_flag_reaches_its_stage() -> None:
    """--method is quantize's, --healer is heal's."""
    steps = dict(plan(read("default"), {"method": "rtn", "healer": "lora"}))
    assert (steps["heal"].healer, steps["quantize"].method) == ("lora", "rtn")
    for flag in ("healer", "method"):
        with pytest.raises(OptionError, match="no stage of this recipe"):
            plan({"prune": {"remove_count": 1}}, {flag: "linear"})


@pytest.mark.parametrize(
    ("recipe", "new"),
    [
        ({"prune": {"layers": [4, 5]}}, "--layers is now --remove-layers"),
        ({"prune": {"remove_layers": 4}}, "remove_count: 4"),
        ({"prune": {"remove_count": 1}, "heal": {"method": "linear"}}, "--method is now --healer"),
    ],
)
def test_a_former_spelling_names_the_new_one(recipe: dict[str, Any], new: str) -> None:
    with pytest.raises(OptionError, match=new):
        plan(recipe, {})


def test_blocks_left_out_cost_nothing_and_come_back(setting: Setting, reference: Path) -> None:
    """Skipping replaces the block, so that its matrices are not run; afterwards the model is what it was."""
    ids = torch.from_numpy(setting.ranking[0])[None]
    before = setting.blocks.logits(ids)
    runs: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=index: runs.append(i)) for index, block in enumerate(setting.blocks.modules)
    ]
    with setting.blocks.without([3, 7]):
        setting.blocks.logits(ids)
    for handle in handles:
        handle.remove()
    assert runs == [i for i in range(16) if i not in (3, 7)]
    assert torch.equal(before, setting.blocks.logits(ids))
    assert read_json(reference / "config.json")["num_hidden_layers"] == len(setting.blocks)
