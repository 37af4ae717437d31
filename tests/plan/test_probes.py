"""A plan for another machine: probes that are written here and measured there, where there is no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from edgepress.pipeline import recipe
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.plan import bounds as bounds_module
from edgepress.pipeline.plan import frontier as frontier_module
from edgepress.pipeline.plan import speed
from edgepress.pipeline.plan.bounds import Planned
from edgepress.pipeline.quantize import trials
from edgepress.pipeline.report.forecast import Bound, Forecast, Point, Usage
from edgepress.pipeline.report.model import ReportFile, read
from edgepress.pipeline.report.text import markdown
from edgepress.pipeline.report.verdict import verdict
from patience import HUNG

MAIN = "from edgepress.pipeline.cli import main; raise SystemExit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def measured(tiny: Path, text: Path, edgepress: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of probes, and the file of what they took on a machine without torch, transformers and onnx."""
    folder = tmp_path_factory.mktemp("probes")
    written = edgepress("plan", tiny, "--method", "rtn", "--text", text, "--probes", folder / "probes")
    assert written.code == 0 and "edgepress machine probes" in written.out, written.err
    heavy = ["torch", "transformers", "safetensors", "onnx", "onnx_ir"]
    # in every process that is started, those that measure too
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({heavy}))")
    light = f"import sys, edgepress.pipeline.plan.probes as p; p.ROUNDS = 1\n{MAIN}"
    arguments = ["machine", str(folder / "probes"), "--out", str(folder / "there.json"), "--threads", "1"]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", light, *arguments],
        capture_output=True, text=True, timeout=HUNG, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "there.json"), done.stderr
    return folder / "probes", folder / "there.json"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little text, every size shown, nothing measured here."""
    for name, tokens in (("TRIAL_TOKENS", 256), ("COST_TOKENS", 512), ("WINDOW", 32)):
        monkeypatch.setattr(trials, name, tokens)
    monkeypatch.setattr(frontier_module, "USELESS", 1e9)
    monkeypatch.setattr(speed, "_measure", None)
    monkeypatch.setattr(frontier_module, "busy", None)
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))


def test_probes_are_measured_where_they_are_copied_to(measured: tuple[Path, Path]) -> None:
    folder, file = measured
    found = read_json(file)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6", "8", "head", "probes.json"]
    assert found["usages"].keys() == {"2", "4", "6", "8", "head"} and found["threads"] == 1 and found["machine"]["cores"] >= 1
    assert all(usage["decode_s"] > 0 and usage["ttft_s"] > 0 for usage in found["usages"].values())


def test_a_plan_for_another_machine(
    measured: tuple[Path, Path], tiny: Path, text: Path, quick: None, call: Callable, tmp_path: Path
) -> None:
    """Its speeds are those of the file, and so is what a bound chooses."""
    content = read_json(measured[1])
    for number, usage in enumerate(content["usages"].values()):
        usage |= {"decode_s": 0.1 + 0.01 * number, "memory": 3e9}
    content["machine"]["cpu"]["model"] = "A slow one"
    write_json(tmp_path / "slow.json", content)
    given = ("plan", tiny, "--method", "rtn", "--calibration", text, "--text", text, "--machine", tmp_path / "slow.json")
    result = call(*given)
    assert result.code == 0, result.err
    assert f"speeds and memory: A slow one, {content['machine']['cores']} cores, 1 threads" in result.out and " 3000 " in result.out
    refusal = call(*given, "--min-speed", "50")
    assert refusal.code == 2 and "keeps to --min-speed on A slow one" in refusal.err and refusal.err.count("error:") == 1
    assert call(*given, "--min-speed", "8").out.count("asked for") == 1


def test_a_file_of_another_machine_suits_its_model_alone(
    measured: tuple[Path, Path],
    tiny: Path,
    reference: Path,
    quick: None,
    call: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Refused before anything is measured: other weights, another version of the file, no such file at all."""
    monkeypatch.setattr(frontier_module, "costs_of", None)
    content = read_json(measured[1])
    write_json(tmp_path / "new.json", content | {"schema": 2})
    write_json(tmp_path / "cut.json", {key: value for key, value in content.items() if key != "usages"})
    write_json(tmp_path / "less.json", content | {"usages": {"4": content["usages"]["4"]}})
    write_json(tmp_path / "still.json", content | {"usages": content["usages"] | {"4": content["usages"]["4"] | {"decode_s": 0.0}}})
    for model, file, reason in (
        (reference, measured[1], "of other probes (of tiny)"),
        (tiny, tmp_path / "new.json", "schema 2"),
        (tiny, tmp_path / "cut.json", "run edgepress machine again"),
        (tiny, tmp_path / "less.json", "was changed since"),
        (tiny, tmp_path / "still.json", "was changed since"),
        (tiny, tmp_path / "none.json", "none.json"),
    ):
        result = call("plan", model, "--method", "rtn", "--machine", file)
        assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err


def test_what_cannot_be_measured_elsewhere_is_one_line(
    measured: tuple[Path, Path], tiny: Path, call: Callable, tmp_path: Path
) -> None:
    described = read_json(measured[0] / "probes.json")
    for name, change in (
        ("half", {}),
        ("away", {"names": ["../half"]}),
        ("none", {"names": []}),
        ("still", {"new_tokens": 0}),
    ):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "probes.json", described | change)
    half = tmp_path / "half"
    for arguments, reason in (
        (("machine", tiny), "is no folder of probes"),
        (("machine", half), "copy the complete folder"),
        (("machine", tmp_path / "away"), "describes no probes in its folder"),
        (("machine", tmp_path / "none"), "describes no probes in its folder"),
        (("machine", tmp_path / "still"), "describes no probes in its folder"),
        (("machine", measured[0], "--out", measured[0] / "probes.json"), "a file of the model in"),
        (("machine", measured[0], "--out", measured[0] / "4" / "model.onnx"), "a file of the model in"),
        (("plan", tiny, "--machine", tiny / "config.json"), "is no file that edgepress machine wrote"),
        (("build", tiny, tmp_path / "out", "--machine", measured[1], "--min-speed", "1", "--cache", "int8"), "leave --cache out"),
        (("machine", measured[0], "--out", tmp_path / "no" / "where.json"), "cannot write"),
        (("plan", tiny, "--probes", half), "is there already"),
        (("plan", tiny, "--probes", tmp_path / "new", "--min-speed", "3"), "leave --min-speed out"),
        (("plan", tiny, "--machine", measured[1], "--no-speed"), "leave one of them out"),
        (("build", tiny, tmp_path / "out", "--machine", measured[1]), "give --min-speed"),
    ):
        result = call(*arguments)
        assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "half", "none", "still"]


def test_a_build_for_another_machine_is_not_judged_by_this_one(caplog: pytest.LogCaptureFixture) -> None:
    """What it takes here is no measurement of there: nothing is missed, and nothing is said to be kept to."""
    file = Path(__file__).parents[2] / "docs" / "example" / "report.json"
    first = read(file).first
    point = Point(10**7, 10**7, 5.0, 8, 0.01, Usage(1e-6, 1e-6, 1.0), asked=True)
    forecast = Forecast(
        (point,), 128, (Bound("--min-speed", "1e6", "speed.decode_tokens_per_s", 1e6, at_least=True),), "Another, 8 cores"
    )
    caplog.set_level("INFO", "edgepress")
    bounds_module.compare(Planned("", forecast), file)
    assert "expected on Another, 8 cores 10.0 MB" in caplog.text and "warning" not in caplog.text
    assert "measured here" in caplog.text and "tokens/s" not in caplog.text.partition("measured here")[2]
    shown = replace(first, forecast=forecast)
    (line,) = [line for line in verdict([shown]) if "--min-speed" in line]
    assert "was planned for --min-speed 1e6 on Another, 8 cores" in line and "keeps" not in line
    page = markdown(ReportFile((shown,)))
    assert f"planned of {first.artifact} for Another, 8 cores" in page.replace("\\", "")
    (row,) = [row for row in page.splitlines() if row.startswith("| measured")]
    assert row.replace(" ", "").endswith("||||")


def test_the_machine_alone_bounds_nothing(measured: tuple[Path, Path]) -> None:
    with pytest.raises(OptionError, match="give --min-speed"):
        recipe.split_bounds({"machine": str(measured[1])})


def test_a_file_of_figures_is_no_part_of_the_model_beside_it(measured: tuple[Path, Path], tiny: Path, copy_of: Callable) -> None:
    """`edgepress machine` writes into the current folder, which may be the model's."""
    folder = copy_of(tiny, "with figures")
    before = Artifact.load(folder).identity()
    (folder / "machine.json").write_bytes(measured[1].read_bytes())
    assert Artifact.load(folder).identity() == before


def test_a_build_for_another_machine(
    measured: tuple[Path, Path], tiny: Path, text: Path, quick: None, call: Callable, tmp_path: Path
) -> None:
    """By the probes of plan; again, and with the file by another name, all is kept; another file is another plan."""
    content = read_json(measured[1])
    content["machine"]["cpu"]["model"] = "A slow one"
    write_json(tmp_path / "there.json", content)

    def built(file: str) -> str:
        result = call("build", tiny, tmp_path / "out", "--machine", tmp_path / file, "--min-speed", "1", "--method", "rtn",
                      "--remove-count", "1", "--no-baseline", "--repeats", "1", "--text", text, "--text-tokens", "256",
                      "--calibration", text, "--no-original-speed")  # fmt: skip
        assert result.code == 0, result.err
        return str(result.err)

    first = built("there.json")
    assert "expected of the whole model on A slow one" in first and "run edgepress bench on the artifact there" in first
    (tmp_path / "there.json").rename(tmp_path / "again.json")
    assert built("again.json").count("already done") >= 4
    write_json(tmp_path / "again.json", content | {"prompt": content["prompt"] - 1})
    assert "what every matrix costs" in built("again.json")
