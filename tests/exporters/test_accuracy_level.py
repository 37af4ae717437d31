"""Accuracy levels: chosen by measurement, weighed against what is lost already, and kept at float where outliers are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import onnx_ir as ir
import pytest
from edgepress.exporters.proof import accuracy_level
from edgepress.exporters.proof.parity import Parity
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.report.steps import Step, describe
from safetensors.torch import load_file, save_file

RTN = QuantizeOptions(method="rtn", group_size=32)
OUTLIER = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The random Llama, with one channel before one down projection made 1000 times larger and its column as much smaller."""
    folder = tmp_path_factory.mktemp("levels") / "model"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5] *= 1000
    weights[f"{OUTLIER}.weight"][:, 5] /= 1000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return stages.run("quantize", Artifact.load(folder), folder.parent / "packed", RTN)


@pytest.fixture
def export(packed: Artifact, text: Path, tmp_path: Path) -> Callable[..., Artifact]:
    return lambda **options: stages.run("export", packed, tmp_path / "out", ExportOptions(text=text, **options))


def levels_of(artifact: Artifact) -> dict[str, int]:
    graph = ir.load(artifact.path / "model.onnx").graph
    return {n.name: n.attributes["accuracy_level"].as_int() for n in graph if n.op_type == "MatMulNBits"}


def test_forced_int8_above_the_limit_is_refused(export: Callable, tmp_path: Path) -> None:
    """Trap 8: int8 activations change what the model says; one line names the ways out, and nothing is written."""
    with pytest.raises(ProofError) as error:
        export(accuracy_level="4", max_added_kl=0)
    line = str(error.value)
    assert "--max-added-kl allows 0" in line and "\n" not in line
    for way in ("--accuracy-level 0", "--exact-layers", "or --max-added-kl "):
        assert way in line
    assert not list(tmp_path.iterdir())


def test_auto_takes_float_above_the_limit(export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no set of matrices at float activations helps; speed does not matter then."""
    monkeypatch.setattr(accuracy_level, "decode_rates", lambda *_: pytest.fail("needless"))
    made = export(max_added_kl=0)
    facts = made.steps[-1].facts
    assert facts["accuracy_level"] == 0 and set(levels_of(made).values()) == {0}
    assert "and 0 is allowed" in facts["accuracy_level_because"]
    assert facts["accuracy_levels_tried"]["4"]["kl_mean"] > 0 and "max_added_kl" not in facts
    assert [proof["accuracy_level"] for proof in facts["parity"]] == [0]
    assert not list(made.path.glob("levels*"))


def test_auto_finds_the_matrices_that_int8_hurts(export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with the outlier is among them, and what is left is within the limit."""
    monkeypatch.setattr(accuracy_level, "decode_rates", lambda *_: {0: 1.0, 4: 2.0})
    added = export(accuracy_level="4").steps[-1].facts["parity"][1]["kl_mean"]
    facts = export(max_added_kl=added / 2).steps[-1].facts
    assert facts["accuracy_level"] == 4 and OUTLIER in facts["exact_layers"] and len(facts["exact_layers"]) == accuracy_level.WORST
    assert facts["parity"][1]["kl_mean"] <= added / 2 == facts["max_added_kl"]


def test_auto_measures_both_levels(export: Callable) -> None:
    """Both figures are in the manifest, and what ships follows from them."""
    made = export(max_added_kl=1)
    facts = made.steps[-1].facts
    tried = facts["accuracy_levels_tried"]
    ratio = tried["4"]["decode_tokens_per_s"] / tried["0"]["decode_tokens_per_s"]
    assert facts["accuracy_level"] == (4 if ratio >= accuracy_level.FASTER else 0)
    assert set(levels_of(made).values()) == {facts["accuracy_level"]}
    said = re.search(r"decodes ([\d.]+) times as fast", facts["accuracy_level_because"])
    assert said and float(said[1]) == pytest.approx(ratio, abs=0.006)
    assert not list(made.path.glob("levels*"))


@pytest.mark.parametrize(
    ("fast", "says"), [(104.98, "1.0498 times as fast"), (104.0, "1.04 times as fast"), (104.9999, "1.049999 times as fast")]
)
def test_too_little_is_not_said_in_the_digits_of_enough(fast: float, says: str) -> None:
    """That 1.05 times would have to be 1.05 times helps nobody."""
    proof = cast(Parity, SimpleNamespace(kl_mean=0.01, loss_change=0.0))
    level, because = accuracy_level._decide(proof, {0: 100.0, 4: fast}, "")
    assert level == 0 and says in because and because.endswith("it would have to be 1.05 times")


def test_what_is_lost_already_is_measured(packed: Artifact, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the original, and only where int8 activations add enough for it to matter."""
    asked: list[accuracy_level.Lost] = []
    real = accuracy_level.Limits.of
    monkeypatch.setattr(accuracy_level.Limits, "of", lambda options, lost: asked.append(lost) or real(options, lost))
    original = packed.path.parent / "model"
    for floor, out in ((0.0, "weighed"), (1.0, "small")):
        monkeypatch.setattr(accuracy_level, "KL_FLOOR", floor)
        monkeypatch.setattr(accuracy_level, "LOSS_FLOOR", floor)
        stages.run("export", packed, tmp_path / out, ExportOptions(text=text, reference=original))
    weighed, small = asked
    assert weighed.kl > 1e-5 and small == accuracy_level.Lost()


def proof(kl: float, change: float, error: float = 0.0) -> Parity:
    return Parity(4, 512, 0, 0, 0, 0, 0.93, kl, 32, 0, change, error)


@pytest.mark.parametrize(
    ("added", "lost", "within"),
    [
        (proof(0.009, 0.004), accuracy_level.Lost(), True),  # top-1 agreement of 93 % judges nothing
        (proof(0.011, 0.004), accuracy_level.Lost(), False),
        (proof(0.009, 0.006), accuracy_level.Lost(), False),
        (proof(0.009, 0.006, 0.001), accuracy_level.Lost(), True),  # not shown to exceed
        (proof(0.02, 0.01), accuracy_level.Lost(0.25, 0.26), True),  # little beside what is lost
        (proof(0.03, 0.01), accuracy_level.Lost(0.25, 0.26), False),
    ],
)
def test_what_int8_may_add(added: Parity, lost: accuracy_level.Lost, within: bool) -> None:
    assert (not accuracy_level.Limits.of(ExportOptions(), lost).exceeded(added)) is within


@pytest.mark.parametrize(
    ("rates", "excess", "level"), [({}, "adds", 0), ({0: 100, 4: 104}, "", 0), ({0: 100, 4: 106}, "", 4), ({0: 100, 4: 50}, "", 0)]
)
def test_the_rule(rates: dict[int, float], excess: str, level: int) -> None:
    """4, unless it adds too much (no rates then) or it is not faster by more than noise."""
    assert accuracy_level._decide(proof(1e-4, 0), rates, excess)[0] == level


def test_float_by_choice_measures_nothing(export: Callable) -> None:
    made = export(accuracy_level="0")
    assert set(levels_of(made).values()) == {0}
    assert made.steps[-1].facts["accuracy_level_because"] == "asked for"


def test_named_layers_stay_float(export: Callable) -> None:
    """A regular expression for whole names; the manifest and the report name the matrices."""
    made = export(accuracy_level="4", exact_layers=r".*\.down_proj")
    levels = levels_of(made)
    assert {name: level for name, level in levels.items() if level == 0} == {f"model.layers.{i}.mlp.down_proj": 0 for i in range(4)}
    assert len(levels) == 17 and made.steps[-1].facts["exact_layers"] == [name for name, level in levels.items() if level == 0]
    export = made.steps[-1]
    assert "accuracy level 4, int8 activations but for 4 matrices at 0" in describe(
        Step(export.stage, export.options, export.facts)
    )


def test_the_matrix_with_the_outlier_is_found(export: Callable) -> None:
    """By measurement; float activations there win back most of what int8 costs."""
    lossy = export(accuracy_level="4").steps[-1].facts["parity"][1]["kl_mean"]
    made = export(accuracy_level="4", exact_layers="1")
    assert made.steps[-1].facts["exact_layers"] == [OUTLIER]
    assert made.steps[-1].facts["parity"][1]["kl_mean"] < 0.5 * lossy


@pytest.mark.parametrize(
    ("requested", "message"), [("17", "there are 17 matrices"), ("0", "give 1 to 16"), ("layers.1", "names no matrix")]
)
def test_layers_that_are_not_there(export: Callable, requested: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        export(exact_layers=requested)
    assert not list(tmp_path.iterdir())
