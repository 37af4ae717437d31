"""Accuracy levels: chosen by measurement, limited by --min-agreement, and kept at float where outliers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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


def test_forced_int8_below_the_limit_is_refused(export: Callable, tmp_path: Path) -> None:
    """Trap 8: int8 activations change the most likely token; one line names the ways out, and nothing is written."""
    with pytest.raises(ProofError) as error:
        export(accuracy_level="4", min_agreement=1.0)
    line = str(error.value)
    assert "asks for 100 %" in line and "\n" not in line
    for way in ("--accuracy-level 0", "--exact-layers", "--min-agreement 0."):
        assert way in line
    assert not list(tmp_path.iterdir())


def test_auto_takes_float_below_the_limit(export: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls back by itself with the reason; speed does not matter then."""
    monkeypatch.setattr(accuracy_level, "decode_rates", lambda *_: pytest.fail("needless"))
    made = export(min_agreement=1.0)
    facts = made.steps[-1].facts
    assert facts["accuracy_level"] == 0 and set(levels_of(made).values()) == {0}
    assert "--min-agreement is 100 %" in facts["accuracy_level_because"]
    assert facts["accuracy_levels_tried"]["4"]["top1_agreement"] < 1
    assert [proof["accuracy_level"] for proof in facts["parity"]] == [0]
    assert not list(made.path.glob("levels*"))


def test_auto_measures_both_levels(export: Callable) -> None:
    """Both figures are in the manifest, and what ships follows from them."""
    made = export(min_agreement=0.5)
    facts = made.steps[-1].facts
    tried = facts["accuracy_levels_tried"]
    ratio = tried["4"]["decode_tokens_per_s"] / tried["0"]["decode_tokens_per_s"]
    assert facts["accuracy_level"] == (4 if ratio >= accuracy_level.FASTER else 0)
    assert set(levels_of(made).values()) == {facts["accuracy_level"]}
    assert f"{ratio:.2f} times as fast" in facts["accuracy_level_because"]
    assert not list(made.path.glob("levels*"))


@pytest.mark.parametrize(("rates", "level"), [({}, 0), ({0: 100, 4: 104}, 0), ({0: 100, 4: 106}, 4), ({0: 100, 4: 50}, 0)])
def test_the_rule(rates: dict[int, float], level: int) -> None:
    """4, unless agreement is under the limit (no rates then) or it is not faster by more than noise."""
    assert accuracy_level._decide(Parity(4, 512, 0, 0, 0, 0, 0.99, 1e-4, 32, 0), rates, ExportOptions())[0] == level


def test_float_by_choice_measures_nothing(export: Callable) -> None:
    made = export(accuracy_level="0")
    assert set(levels_of(made).values()) == {0}
    assert made.steps[-1].facts["accuracy_level_because"] == "asked for"


def test_named_layers_stay_float(export: Callable) -> None:
    """A regular expression for whole names; the manifest and the report name the matrices."""
    made = export(accuracy_level="4", min_agreement=0.5, exact_layers=r".*\.down_proj")
    levels = levels_of(made)
    assert {name: level for name, level in levels.items() if level == 0} == {f"model.layers.{i}.mlp.down_proj": 0 for i in range(4)}
    assert len(levels) == 17 and made.steps[-1].facts["exact_layers"] == [name for name, level in levels.items() if level == 0]
    export = made.steps[-1]
    assert "accuracy level 4 but for 4 matrices at 0" in describe(Step(export.stage, export.options, export.facts))


def test_the_matrix_with_the_outlier_is_found(export: Callable) -> None:
    """By measurement; float activations there win back most of what int8 costs."""
    lossy = export(accuracy_level="4", min_agreement=0.5).steps[-1].facts["parity"][1]["kl_mean"]
    made = export(accuracy_level="4", min_agreement=0.5, exact_layers="1")
    assert made.steps[-1].facts["exact_layers"] == [OUTLIER]
    assert made.steps[-1].facts["parity"][1]["kl_mean"] < 0.5 * lossy


@pytest.mark.parametrize(
    ("requested", "message"), [("17", "there are 17 matrices"), ("0", "give 1 to 16"), ("layers.1", "names no matrix")]
)
def test_layers_that_are_not_there(export: Callable, requested: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        export(exact_layers=requested)
    assert not list(tmp_path.iterdir())
