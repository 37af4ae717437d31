"""How much to remove, as flags and recipes give it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.recipe import plan, read


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


def test_what_chooses_follows_from_what_comes_after() -> None:
    """Healed where the build heals; alone a limit holds for what is written; what is said is kept."""

    def criterion(recipe: dict[str, Any], **flags: object) -> str:
        return str(dict(plan(recipe, flags))["prune"].resolved().criterion)

    default = read("default")
    assert criterion(default) == criterion({"prune": {"remove_count": 1}, "heal": {}}) == "healed"
    assert criterion(default, healer="none") == criterion({"prune": {"max_loss": 0.1}}) == "greedy"
    assert criterion(default, criterion="bi") == "bi" and criterion(default, remove_layers="1,2") == "list"
    assert PruneOptions(remove_count=1).resolved().criterion == "healed"
    assert (
        PruneOptions(max_loss=0.1).resolved().criterion
        == PruneOptions(max_loss=0.1, remove_count=3).resolved().criterion
        == "greedy"
    )


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


@pytest.mark.parametrize(("flag", "value"), [("target_bits", 4.5), ("max_growth", 0.05), ("bits", 8)])
@pytest.mark.parametrize("given", [{"bits": 4, "bits_for": [".*o_proj=8"]}, {"max_growth": 0.1}, {"target_bits": 5.0}])
def test_a_flag_for_bits_replaces_the_recipes_own_way(flag: str, value: float, given: dict[str, object]) -> None:
    """Ways to say it exclude each other, and who gave one flag gave one way."""
    ((_, options),) = plan({"quantize": {"method": "gptq", **given}}, {flag: value})
    assert getattr(options, flag) == value
    ((_, options),) = plan({"quantize": {"max_size": "9MB", "native_bits": True}}, {flag: value})
    assert getattr(options, flag) == value and options.native_bits == (flag == "target_bits")  # which is another way to choose


def test_a_text_that_nothing_reads_is_no_difference(tmp_path: Path) -> None:
    """A stage that is done is not done again for it."""
    one, other = (PruneOptions(remove_count=1, criterion="greedy", other_text=text) for text in (tmp_path / "a", tmp_path / "b"))
    assert one.resolved() == other.resolved()
    healed = (PruneOptions(remove_count=1, other_text=text).resolved() for text in (tmp_path / "a", tmp_path / "b"))
    assert len(set(healed)) == 2
