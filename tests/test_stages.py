"""What is done and whole is kept, what changed is done again, and an interruption costs no more than the stage it met."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline import interrupt, recipe
from edgepress.pipeline import stages as pipeline_stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.cli import commands as cli
from edgepress.pipeline.files import MANIFEST, read_json, sha256
from edgepress.pipeline.options import PruneOptions

STAGES = ["01-prune", "02-quantize", "03-export", "04-bench"]
Call = Callable[..., Any]


def build_arguments(tiny: Path, out: Path, text: Path, stages: list[str] = STAGES) -> list[str]:
    """The command that builds all stages, or with a recipe of its own the first two or three."""
    flags: dict[str, object] = {"method": "rtn", "remove-layers": 1, "calibration": text, "calibration-tokens": 512}
    if len(stages) > 2:
        flags["text"] = text
    if len(stages) == 4:
        flags |= {"text-tokens": 256, "repeats": 1, "prompt-lengths": 8, "new-tokens": 4}
    settings = {"bench": "{baseline: false, original_speed: false}"}
    recipe = flags["recipe"] = out.parent / f"{len(stages)}.yaml"
    recipe.write_text("".join(f"{name[3:]}: {settings.get(name[3:], '{}')}\n" for name in stages))
    return ["build", str(tiny), str(out), *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]


def times(folder: Path) -> dict[str, int]:
    """Time of change of every file below."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def copied(source: Path, target: Path, stages: list[str] = STAGES) -> Path:
    """The stages of a build, with their files' times."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage)
    return target


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")] if folder.is_dir() else []


def kept(err: str) -> list[str]:
    return re.findall(r"^(\w+): already done", err, re.MULTILINE)


# --- one stage


def quantize(call: Call, source: Path, out: Path, *flags: object) -> tuple[bool, dict[str, int]]:
    """Whether the stage was kept, and the times of its files."""
    result = call("quantize", source, out, "--method", "rtn", *flags)
    assert result.code == 0, result.err
    assert not hidden(out.parent)
    return kept(result.err) == ["quantize"], times(out)


def test_done_stage_is_kept(call: Call, tiny: Path, tmp_path: Path) -> None:
    """The same command again touches nothing, also when the source lies elsewhere now."""
    out = tmp_path / "out"
    first, files = quantize(call, tiny, out)
    assert not first
    assert quantize(call, tiny, out) == (True, files)
    shutil.copytree(tiny, tmp_path / "moved")
    assert quantize(call, tmp_path / "moved", out) == (True, files)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path, Path], Any], list[object]]] = {
    "another option": (lambda source, out: None, ["--bits", 8]),
    "a text under the same name": (lambda source, out: (source / "text.txt").write_text("other words"), []),
    "a weight of the source": (lambda source, out: flip(source / "model.safetensors"), []),
    "the source's config": (
        lambda source, out: (source / "config.json").write_text(
            json.dumps(read_json(source / "config.json") | {"rms_norm_eps": 1e-5})
        ),
        [],
    ),
    "a byte of the output": (lambda source, out: flip(out / "packed.safetensors"), []),
    "a byte of the output's config": (lambda source, out: flip(out / "config.json"), []),
    "an output file lost": (lambda source, out: (out / "tokenizer.json").unlink(), []),
    "a hash in the manifest": (
        lambda source, out: (out / MANIFEST).write_text((out / MANIFEST).read_text().replace('"sha256": "', '"sha256": "0')),
        [],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_stage_is_done_again(
    case: str, call: Call, copy_of: Callable[..., Path], tiny: Path, text: Path, tmp_path: Path
) -> None:
    """Kept by mistake, an old result would pass for the new one."""
    change, flags = CHANGES[case]
    source, out = copy_of(tiny), tmp_path / "out"
    shutil.copy(text, source / "text.txt")
    flags = ["--calibration", source / "text.txt", *flags]
    quantize(call, source, out, *flags[:2])
    change(source, out)
    again, files = quantize(call, source, out, *flags)
    assert not again
    assert quantize(call, source, out, *flags) == (True, files)
    for name, known in read_json(out / MANIFEST)["files"].items():
        assert sha256(out / name) == known["sha256"]


def test_failure_keeps_the_former_result(call: Call, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is replaced only by something whole."""
    out = tmp_path / "out"
    _, files = quantize(call, tiny, out)

    def fail(source: object, folder: Path, options: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise MemoryError

    monkeypatch.setattr("edgepress.pipeline.stages.load", lambda _: fail)
    assert call("quantize", tiny, out, "--method", "rtn", "--bits", 8).code == 2
    assert times(out) == files and not hidden(tmp_path)


def test_file_of_another_that_came_during_the_work(call: Call, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT is looked at again before it is replaced."""
    out = tmp_path / "out"
    quantize(call, tiny, out)

    def write(source: object, folder: Path, options: object) -> dict[str, object]:
        (folder / "model.safetensors").write_bytes(b"whole")
        (out / "thesis.txt").write_text("years of work")
        return {}

    monkeypatch.setattr("edgepress.pipeline.stages.load", lambda _: write)
    result = call("quantize", tiny, out, "--method", "rtn", "--bits", 8)
    assert result.code == 2 and "did not write" in result.err
    assert (out / "thesis.txt").read_text() == "years of work" and not hidden(tmp_path)


# --- a build


@pytest.fixture(scope="module")
def built(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The OUT of a finished build."""
    out = tmp_path_factory.mktemp("built") / "out"
    assert cli.main(build_arguments(tiny, out, text)) == 0
    return out


def test_a_kill_while_the_cost_is_written_leaves_nothing_for_good(built: Path, tiny: Path, text: Path) -> None:
    """All stages are done then, and the next build has no cost to write."""
    (left := built / ".build.json.part").write_text("{")
    assert cli.main(build_arguments(tiny, built, text)) == 0 and not left.exists()


@pytest.mark.parametrize(
    ("size", "types", "facts", "said"),
    [
        (1000, ["Q4_K"], {}, True),
        (10**9, ["Q4_K"], {}, False),
        (1000, ["Q8_0"], {}, False),
        (1000, [], {}, False),
        (1000, ["Q4_K"], {"max_bytes": 5}, False),  # as large as it was asked to be
    ],
)
def test_an_artifact_larger_than_its_gguf_is_said(
    size: int, types: list[str], facts: dict, said: bool, built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody expects that of a tool that makes models smaller."""
    with (tmp_path / "model.gguf").open("wb") as file:
        file.truncate(size)
    caplog.set_level("INFO", "edgepress")
    artifact = Artifact.load(built / "03-export")
    first, *others = artifact.steps
    given = [replace(step, facts=step.facts | (facts if step.stage == "quantize" else {})) for step in others]
    artifact = replace(artifact, steps=[replace(first, stage="import", facts={"quantized_types": types}), *given])
    recipe._compare_with(tmp_path / "model.gguf", artifact)
    assert ("its weights have few bits already" in caplog.text) == said


@pytest.mark.parametrize("stage", STAGES)
def test_manifest_describes_its_folder(stage: str, built: Path) -> None:
    """Every file with size and hash, every stage so far with what it was told, what it found and who did it."""
    folder = built / stage
    content = read_json(folder / MANIFEST)
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert files and content["files"] == {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()
    }
    assert re.fullmatch("[0-9a-f]{64}", content["fingerprint"])
    assert content["format"] == {"01": "hf", "02": "packed", "03": "onnx", "04": "report"}[stage[:2]]
    assert [step["stage"] for step in content["steps"]] == [name[3:] for name in STAGES[: STAGES.index(stage) + 1]]
    for step in content["steps"]:
        assert step["options"] and step["facts"] and step["seconds"] >= 0
        assert {"edgepress", "torch", "transformers", "numpy"} <= set(step["versions"])
    assert len({read_json(built / name / MANIFEST)["fingerprint"] for name in STAGES}) == len(STAGES)


def test_second_build_keeps_all(call: Call, built: Path, tiny: Path, text: Path) -> None:
    """Nothing is written, and the report is still shown."""
    before = times(built)
    result = call(*build_arguments(tiny, built, text))
    assert result.code == 0 and kept(result.err) == ["prune", "quantize", "export", "bench"]
    assert times(built) == before
    assert "report.md" in result.out and "03-export" in result.out


@pytest.mark.parametrize(
    ("flag", "value", "stages", "same"),
    [
        pytest.param("--new-tokens", 8, STAGES, 3, id="bench", marks=pytest.mark.families),  # as any last stage, at its price
        pytest.param("--accuracy-level", 0, STAGES[:3], 2, id="last stage"),
        pytest.param("--bits", 8, STAGES[:2], 1, id="second stage"),
    ],
)
def test_changed_option_redoes_from_its_stage(
    flag: str, value: int, stages: list[str], same: int, call: Call, built: Path, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """What stands before the change is kept, what follows from it is not."""
    out = copied(built, tmp_path / "out", stages)
    before = times(out)
    result = call(*build_arguments(tiny, out, text, stages), flag, value)
    assert result.code == 0 and kept(result.err) == [stage[3:] for stage in stages[:same]]
    unchanged = {name.split("/")[0] for name, time in times(out).items() if before.get(name) == time and name.endswith(MANIFEST)}
    assert unchanged == set(stages[:same]) and not hidden(out)


def test_damaged_stage_of_a_build(call: Call, built: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """One byte in the middle: that stage is done again, and what follows is kept because it comes out the same."""
    out = copied(built, tmp_path / "out")
    flip(out / "02-quantize" / "packed.safetensors")
    result = call(*build_arguments(tiny, out, text))
    assert result.code == 0 and kept(result.err) == ["prune", "export", "bench"]
    assert sha256(out / "02-quantize" / "packed.safetensors") == sha256(built / "02-quantize" / "packed.safetensors")


# --- interruptions


# The stage whose folder is named waits before its manifest, so that no signal comes too late; the rest is the real thing.
WAITING = """
import signal, sys, time
from edgepress.pipeline.cli import commands as cli
from edgepress.pipeline import stages
stage, seconds, interrupt, *arguments = sys.argv[1:]
signal.signal(signal.SIGINT, getattr(signal, interrupt, signal.default_int_handler))
write_manifest = stages.write_manifest
def wait(folder, *rest):
    if folder.name == stage:
        time.sleep(float(seconds))
    write_manifest(folder, *rest)
stages.write_manifest = wait
sys.exit(cli.main(arguments))
"""


def interrupted(
    out: Path, stage: str, sent: int, arguments: list[str], *, seconds: float = 120, interrupt: str = "default_int_handler"
) -> tuple[int, str]:
    """Run a command in its own process, send a signal as soon as the stage has begun; its exit code and stderr."""
    partial = out / f".{stage}.partial"
    command = [sys.executable, "-c", WAITING, partial.name, str(seconds), interrupt, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not partial.is_dir() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            process.send_signal(sent)
            _, err = process.communicate(timeout=seconds + 60)
        finally:
            process.kill()
    return process.returncode, err


KILLS = [
    ("03-export", "SIGINT"),
    ("02-quantize", "SIGKILL"),
    *(pytest.param(stage, "SIGINT", marks=pytest.mark.families) for stage in STAGES if stage != "03-export"),
    # what bench keeps after a kill: tests/bench/test_journal.py
    *(pytest.param("04-bench", name, marks=pytest.mark.families) for name in ("SIGKILL", "SIGTERM")),
]


@pytest.mark.parametrize(("stage", "name"), KILLS)
def test_interrupted_build_goes_on(stage: str, name: str, call: Call, built: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """No half-written folder under a final name, a polite end cleans up, and the same command finishes what was begun."""
    before = STAGES[: STAGES.index(stage)]
    out = copied(built, tmp_path / "out", before)
    earlier = times(out) if before else {}
    stages = STAGES[: max(2, len(before) + 1)]
    arguments = build_arguments(tiny, out, text, stages)
    code, err = interrupted(out, stage, getattr(signal, name), arguments)
    # what bench had finished measuring stays, to go on from
    journal = [name for name in hidden(out) if stage == "04-bench" and name == ".04-bench.measured.jsonl"]

    assert not (out / stage).exists()
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
        assert sorted(hidden(out)) == sorted([f".{stage}.partial", *journal, ".edgepress-lease", ".edgepress-lock"])
    else:
        assert code == 130, err
        assert "interrupted" in err.splitlines()[-1] and "Traceback" not in err
        assert hidden(out) == journal

    result = call(*arguments)
    assert result.code == 0, result.err
    assert kept(result.err) == [stage[3:] for stage in before]
    assert {key: value for key, value in times(out).items() if key in earlier} == earlier
    assert sorted(p.name for p in out.iterdir()) == [*stages, "build.json"]


def test_a_build_that_keeps_no_stages(call: Call, built: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """The artifact is the same; weights go as it does, and a build with other options makes anew what it needs."""
    command = [*build_arguments(tiny, out := copied(built, tmp_path / "out", STAGES[:1]), text, STAGES[:3]), "--keep-stages", "no"]
    assert (first := call(*command)).code == 0, first.err
    assert kept(first.err) == ["prune"]
    assert [stage for stage in STAGES[:3] if list((out / stage).glob("*.safetensors"))] == []
    assert (out / "01-prune" / "influence.json").is_file() and (out / "02-quantize" / "config.json").is_file()
    assert Artifact.load(out / "03-export").files == Artifact.load(built / "03-export").files

    before = times(out / "03-export")
    assert (again := call(*command)).code == 0, again.err
    assert kept(again.err) == ["prune", "quantize", "export"] and times(out / "03-export") == before

    assert (alone := call("export", out / "02-quantize", tmp_path / "other")).code == 2
    assert "--keep-stages no" in alone.err and len(alone.err.splitlines()) == 1

    assert (other := call(*command, "--accuracy-level", "0")).code == 0, other.err
    assert kept(other.err) == [] and "with 0 stages" not in other.err
    assert Artifact.load(out / "03-export").damaged() == []
    assert (whole := call(*command[:-2], "--accuracy-level", "0")).code == 0, whole.err  # nothing is made anew for its own sake
    assert kept(whole.err) == ["prune", "quantize", "export"]


def test_a_long_build_says_how_much_is_left(
    call: Call, built: Path, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each stage that took long, but for those that were done already, and the last; nothing where all are done."""
    monkeypatch.setattr(recipe, "LONG", 0.0)
    result = call(*build_arguments(tiny, out := copied(built, tmp_path / "out", STAGES[:1]), text, STAGES[:3]))
    assert result.code == 0, result.err
    said = [line for line in result.err.splitlines() if line.startswith("build: ")]
    assert re.fullmatch(r"build: expect \d+ to \d+ seconds and about .*, with 1 stages? done already", said[0])
    assert [bool(re.fullmatch(r"build: about \d+ to \d+ seconds are left", line)) for line in said[1:-1]] == [True], said
    (out / "02-quantize" / "packed.safetensors").write_bytes(b"damaged")  # its manifest says that it is done
    again = call(*build_arguments(tiny, out, text, STAGES[:3]))
    assert again.code == 0 and "are left" not in again.err, again.err


def test_politely_killed_in_the_background(built: Path, text: Path, tmp_path: Path) -> None:
    """A shell script starts `edgepress ... &` with SIGINT ignored: SIGTERM must end it all the same."""
    arguments = ["bench", str(built / "03-export"), "--out", str(tmp_path / "bench"), "--text", str(text)]
    flags = ["--text-tokens", "64", "--repeats", "1", "--prompt-lengths", "8", "--new-tokens", "4", "--no-original-speed"]
    code, err = interrupted(tmp_path, "bench", signal.SIGTERM, arguments + flags, seconds=3, interrupt="SIG_IGN")
    assert code == 130, err
    assert [p.name for p in tmp_path.iterdir() if p.name != ".bench.measured.jsonl"] == []


def test_leftovers_of_a_killed_run_are_cleared(call: Call, tiny: Path, tmp_path: Path) -> None:
    """Also what was killed between the two renames, when the former folder stands aside."""
    for name in (".out.partial", ".out.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    kept_before, _ = quantize(call, tiny, tmp_path / "out")
    assert not kept_before and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


FINALIZER = """
import os, signal, time
from edgepress.pipeline import interrupt

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

interrupt.install_handlers()
try:
    Slow()
    {waits}
except KeyboardInterrupt:
    print("interrupted")
    time.sleep(0.3)
    print("cleaned up")
"""


@pytest.mark.parametrize("waits", ["time.sleep(60)", "interrupt.check()"])
def test_an_interrupt_in_a_finalizer_comes_again(waits: str) -> None:
    """Python cannot raise it there: without a second one the command would go on, with a traceback on the screen.

    It does not come while things are cleaned up.
    """
    done = subprocess.run([sys.executable, "-c", FINALIZER.format(waits=waits)], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == ("interrupted\ncleaned up\n", "")


def test_interrupted_before_it_has_begun(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handlers are there, and nothing else is yet."""
    monkeypatch.setattr(cli, "double_runtime", lambda: signal.raise_signal(signal.SIGTERM))
    result = call("show", "nowhere")
    assert (result.code, result.err.strip()) == (130, "interrupted")


def test_the_callers_hook_is_back_after_a_command(call: Call) -> None:
    before = sys.unraisablehook
    assert call("show", "nowhere").code == 2 and sys.unraisablehook is before


def test_a_swallowed_interrupt_is_noticed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code may drop what Ctrl-C raised: the stage ends before its folder gets its name."""
    monkeypatch.setattr(interrupt, "signals", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        pipeline_stages.run("prune", Artifact.load(tiny), tmp_path / "out", PruneOptions(remove_layers=(1,)))
    assert not (tmp_path / "out").exists()
