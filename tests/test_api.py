"""The Python API: its names, its promises, and that rooms of the same names do not take a function's place."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import edgepress.pipeline as api
import pytest
from edgepress.pipeline.errors import InputError, OptionError
from patience import HUNG


def test_every_public_name_is_documented_and_there_is_no_other() -> None:
    assert sorted(api.__all__) == api.__all__
    for name in api.__all__:
        assert inspect.getdoc(getattr(api, name))
    functions = {name for name, value in vars(api).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert functions | {"Artifact"} == set(api.__all__)


def test_importing_it_takes_no_heavy_package() -> None:
    code = """
import sys
from edgepress.pipeline import Artifact, bench, build, export, heal, load, prune, quantize, verify
heavy = {"torch", "transformers", "onnxruntime", "onnx", "safetensors", "tokenizers", "huggingface_hub", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stderr


def test_functions_stay_functions_when_their_rooms_are_used() -> None:
    from edgepress.pipeline.prune.stage import prune
    from edgepress.pipeline.quantize.stage import quantize

    assert api.prune is not prune and inspect.isfunction(api.prune)
    assert api.quantize is not quantize and inspect.isfunction(api.quantize)


def test_a_model_is_pressed_and_run_in_python(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Stage by stage, with the options of the command line."""
    pruned = api.prune(tiny, tmp_path / "pruned", remove_layers=[1], calibration=text, calibration_tokens=300)
    packed = api.quantize(pruned.path, tmp_path / "packed", method="rtn", group_size=32)
    exported = api.export(packed.path, tmp_path / "onnx", text=text)
    assert [step.stage for step in exported.steps] == ["prune", "quantize", "export"]
    assert len(list(api.load(exported.path).stream("It was", max_new_tokens=4))) == 4
    checks = api.verify(exported.path, original=packed.path, text=text)
    assert {check.state for check in checks} == {"ok"}


def test_errors_name_the_option(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'remove_count'"):
        api.prune(tiny, tmp_path / "out", remove_coun=1)
    with pytest.raises(OptionError, match="no stage of this recipe"):
        api.build(tiny, tmp_path / "out", bitz=4)
    with pytest.raises(InputError, match="no such folder"):
        api.load(tmp_path / "nowhere")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def onnx(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.export(tiny, tmp_path_factory.mktemp("api") / "onnx", text=text).path


@pytest.mark.parametrize("option", [{"temperature": -1}, {"max_new_tokens": -3}, {"seed": -1}])
def test_generation_takes_the_command_lines_checks(option: dict[str, int], onnx: Path) -> None:
    with pytest.raises(OptionError, match="must be at least"):
        api.load(onnx).stream("It was", **option)


def test_a_later_stream_ends_an_earlier_one(onnx: Path) -> None:
    model = api.load(onnx)
    first = model.stream("It was", max_new_tokens=5)
    next(first)
    assert len(list(model.stream("A cold", max_new_tokens=5))) > 0
    with pytest.raises(OptionError, match="a later stream has begun"):
        next(first)


def test_a_count_is_not_taken_for_an_index(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="remove_count: 2"):
        api.prune(tiny, tmp_path / "out", remove_layers=2)
