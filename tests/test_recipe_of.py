"""A recipe printed of an artifact builds the same one again, and chooses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from edgepress.models import RECIPES
from edgepress.models.real import REAL_MODELS
from edgepress.pipeline import recipe
from edgepress.pipeline.artifact import Artifact, Step
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import PruneOptions, QuantizeOptions
from edgepress.pipeline.recipe_of import recipe_text

CHOOSING = """
prune: {remove_count: 1, criterion: bi, calibration: short.txt}
quantize: {method: rtn, target_bits: 5, calibration: short.txt}
export: {cache: int8}
"""


def test_what_was_chosen_is_given(call: Callable, tiny: Path, text: Path, tmp_path: Path) -> None:
    """The layers and the bits of every matrix; the graph and its weights are the same to the byte."""
    (tmp_path / "short.txt").write_bytes(text.read_bytes())
    (tmp_path / "first.yaml").write_text(CHOOSING)
    assert call("build", tiny, tmp_path / "first", "--recipe", tmp_path / "first.yaml").code == 0
    shown = call("show", tmp_path / "first", "--recipe")
    assert shown.code == 0, shown.err
    found = yaml.safe_load(shown.out)
    removed = read_json(tmp_path / "first" / "01-prune" / "manifest.json")["steps"][-1]["facts"]["removed_layers"]
    assert found["prune"] == {"remove_layers": removed} and found["export"]["cache"] == "int8" and found["bench"] == {}
    assert "target_bits" not in found["quantize"] and found["quantize"]["bits_for"]
    assert "# quantize read short.txt for calibration: add its path\n" in shown.out and "5 asked for" in shown.out
    (tmp_path / "second.yaml").write_text("".join(line for line in shown.out.splitlines(True) if not line.startswith("bench")))
    assert call("build", tiny, tmp_path / "second", "--recipe", tmp_path / "second.yaml").code == 0
    first, second = (Artifact.load(tmp_path / name / "03-export") for name in ("first", "second"))
    assert first.files["model.onnx"] == second.files["model.onnx"]
    assert first.files["model.onnx.data"] == second.files["model.onnx.data"]


def test_what_removed_nothing_is_left_out(tiny: Path) -> None:
    """Nor are defaults there, nor a text that is the default; one that the model wrote is."""
    steps = (
        Step("import", {"keep_codes": False}, {}, 1.0, {}),
        Step("prune", {"max_loss": 0.01}, {"removed_layers": []}, 1.0, {}),
        Step("heal", {"healer": "linear"}, {}, 1.0, {}),
        Step("quantize", {"method": "gptq", "bits": 4, "calibration": {"self": ["3-ab", 64]}}, {}, 1.0, {}),
    )
    found = yaml.safe_load(recipe_text(replace(Artifact.load(tiny), steps=steps)))
    assert found == {"quantize": {"bits": 4, "calibration": "self"}}


def quantized(**given: object) -> Step:
    """What chose eight bits everywhere, or as ``given``."""
    chosen = {"method": "rtn", "bits": 8, "group_size": -1, "bits_for": [], "act_order": False} | given
    return Step("quantize", {"method": "gptq", "act_order": True, "max_growth": 0.05}, {"chosen": chosen}, 1.0, {})


def test_a_recipe_can_be_built(tiny: Path, tmp_path: Path) -> None:
    """What a choice did away with does not come back; files are remarks, in one line; bench has the target, but beside no page."""
    steps = (
        Step("trim", {"keep_text": [{"file": "a\nquantize: {}", "sha256": "0"}], "keep_tokens": 300}, {}, 1.0, {}),
        quantized(),
        Step("tune", {"minutes": 3.0}, {"accepted": False}, 1.0, {}),
        Step("export", {"target": "web", "original": {"folder": "float", "identity": "0"}}, {}, 1.0, {}),
        Step("page", {}, {}, 1.0, {}),
    )
    paged = yaml.safe_load(recipe_text(replace(Artifact.load(tiny), steps=steps)))
    assert list(paged) == ["trim", "quantize", "export", "page"]
    text = recipe_text(replace(Artifact.load(tiny), steps=steps[:-1]))
    found = yaml.safe_load(text)
    assert list(found) == ["trim", "quantize", "export", "bench"] and found["trim"] == {"keep_tokens": 300}
    assert found["quantize"] == {"method": "rtn", "bits": 8, "group_size": -1} and found["bench"] == {"target": "web"}
    assert "# trim read a\\nquantize: {} for keep_text: add its path\n" in text and "# export read float for original" in text
    (tmp_path / "it.yaml").write_text(text)
    assert [name for name, _ in recipe.plan(recipe.read(str(tmp_path / "it.yaml")), {})] == list(found)
    kept = yaml.safe_load(recipe_text(replace(Artifact.load(tiny), steps=(quantized(method="gptq", bits=4, act_order=True),))))
    assert kept["quantize"] == {"bits": 4, "group_size": -1, "act_order": True}


def test_the_level_that_was_chosen_is_given(tiny: Path) -> None:
    """With the matrices that keep float activations, whose names are no expressions."""
    facts = {"accuracy_level": 4, "accuracy_levels_tried": {"4": {}}, "exact_layers": ["layers.0.down", "head"]}
    export = Step("export", {"accuracy_level": "auto", "max_added_kl": 0.1}, facts, 1.0, {})
    found = yaml.safe_load(recipe_text(replace(Artifact.load(tiny), steps=(export,))))
    assert found["export"] == {"accuracy_level": "4", "exact_layers": r"layers\.0\.down|head"}


def test_what_ran_twice_is_no_recipe(tiny: Path) -> None:
    """The second removal counts the layers that the first one left."""
    steps = tuple(Step("prune", {}, {"removed_layers": [layer]}, 1.0, {}) for layer in (3, 5))
    with pytest.raises(InputError, match="prune ran twice"):
        recipe_text(replace(Artifact.load(tiny), steps=steps))


def test_what_edgepress_did_not_make_has_none(tiny: Path) -> None:
    with pytest.raises(InputError, match="was not written by edgepress"):
        recipe_text(Artifact.load(tiny))


@pytest.mark.parametrize("name", [f"{file.parent.name}:{file.stem}" for file in sorted(RECIPES.glob("*/*.yaml"))])
def test_a_models_recipe_chooses_nothing(name: str) -> None:
    """It has a name of its own, says in a comment what was measured, and all that takes long to choose is settled in it."""
    model, _, aim = name.partition(":")
    comment = [line for line in (RECIPES / model / f"{aim}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any("measured: " in line for line in comment) and any("edgepress build" in line for line in comment)
    steps = dict(recipe.plan(recipe.read(name), {}))
    assert list(steps)[-3:] == ["quantize", "export", "bench"]
    quantize, prune = steps["quantize"], steps.get("prune")
    assert isinstance(quantize, QuantizeOptions) and not quantize.chooses
    assert prune is None or (isinstance(prune, PruneOptions) and prune.remove_layers)


def test_a_build_tells_of_the_recipes_of_a_known_model(tmp_path: Path) -> None:
    """Known by name and size, at no cost; nobody else's file is."""
    model = REAL_MODELS["smollm2"]
    known = tmp_path / model.file
    known.touch()
    assert recipe.recipes_of(known) == []
    with known.open("wb") as file:
        file.truncate(model.bytes)
    assert "smollm2-135m:balanced" in recipe.recipes_of(known) and set(recipe.recipes_of(known)) <= set(recipe._shipped())
    assert recipe.recipes_of(known.rename(tmp_path / "mine.gguf")) == []
    assert {file.parent.name for file in RECIPES.glob("*/*.yaml")} <= {model.recipes for model in REAL_MODELS.values()}
