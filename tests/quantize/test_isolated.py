"""The isolated process: its errors, its end, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.lock import descriptors, writing
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.progress import ENDED, Mirror
from edgepress.pipeline.quantize import gptq, gptqmodel, isolated
from edgepress.pipeline.stages import run
from patience import HUNG
from quantizing import job_of


def test_gptq_failure_has_its_reason(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work fails in a process of its own; the user sees its last words, not an exit code alone."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'INFO noise'\necho 'RuntimeError: not enough memory for block 3' >&2\necho\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ProofError, match=r"3: RuntimeError: not enough memory for block 3$"):
        run("quantize", Artifact.load(tiny), tmp_path / "out", QuantizeOptions(method="gptqmodel"))
    assert [p.name for p in tmp_path.iterdir()] == ["python"]


STAGE = """
import sys
from pathlib import Path
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
method, (source, out, text) = sys.argv[1], map(Path, sys.argv[2:])
options = QuantizeOptions(method=method, calibration=text, calibration_tokens=2048, bits=4, group_size=64)
run("quantize", Artifact.load(source), out, options)
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a dead one that nobody has asked after counts as gone)."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


LOST = {
    "another family": ("mistral", {}, " (gptqmodel can resume only llama and qwen3_moe, and this is mistral)"),
    "bits by module": ("llama", {"model.layers.0.mlp.up_proj": (8, 64)}, " (--bits-for cannot be resumed)"),
    "before the first layer": ("llama", {}, ""),
}


@pytest.mark.parametrize("case", LOST)
def test_gptq_that_cannot_go_on_says_so(
    case: str,
    tiny: Path,
    copy_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed outright it could say nothing: the same command says, when it begins anew, what is lost and why."""
    family, exceptions, because = LOST[case]
    job = job_of(copy_of(tiny, model_type=family), lambda: [np.arange(16)])
    job = dataclasses.replace(job, scratch=tmp_path / "scratch", exceptions=exceptions)
    caplog.set_level("INFO", "edgepress")
    for _ in range(2):
        monkeypatch.setattr(gptqmodel, "_run", lambda settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gptqmodel.quantize(job)
    assert caplog.messages == [f"quantize: GPTQ starts over, its progress before the interruption is lost{because}"]
    (tmp_path / "scratch" / "checkpoint").mkdir()
    (tmp_path / "scratch" / "checkpoint" / "CURRENT").touch()
    with pytest.raises(ZeroDivisionError):
        gptqmodel.quantize(job)
    assert "resumes after the last layer" in caplog.messages[-1]


def test_isolated_process_keeps_the_lock(tmp_path: Path) -> None:
    """It writes beside OUT, and outlives a parent that was killed: the lock is its own too."""
    with writing(tmp_path / "out"):
        (descriptor,) = descriptors()
        assert isolated.run_isolated("os:fstat", (descriptor,), "work", tmp_path / "scratch") == os.fstat(descriptor)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"[" * 100_000, b"\0" * 512, b"\xff"], ids=range(6))
def test_gptq_starts_over_from_a_broken_job(broken: bytes, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off by a kill or a full disk: nothing tells what the checkpoint beside it belongs to."""
    scratch = tmp_path / "scratch"
    (scratch / "checkpoint").mkdir(parents=True)
    (scratch / "checkpoint" / "CURRENT").touch()
    (scratch / "job.json").write_bytes(broken)
    monkeypatch.setattr(gptqmodel, "_run", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gptqmodel.quantize(dataclasses.replace(job_of(tiny, lambda: [np.arange(16)]), scratch=scratch))
    assert [p.name for p in scratch.iterdir()] == ["job.json"] and (scratch / "job.json").stat().st_size > 512


def test_gptq_that_ends_early_says_what_is_lost(
    tiny: Path, copy_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through both processes: the reason is known in the one that dies, and said by the other."""
    end = "import os; from edgepress.pipeline.quantize import gptqmodel; gptqmodel._run = lambda settings: os._exit(9)\n"
    monkeypatch.setattr(isolated, "CHILD", end + isolated.CHILD)
    caplog.set_level("INFO", "edgepress")
    with pytest.raises(ProofError, match="exit code 9"):
        run("quantize", Artifact.load(copy_of(tiny, model_type="mistral")), tmp_path / "out", QuantizeOptions(method="gptqmodel"))
    lost = "lost (gptqmodel can resume only llama and qwen3_moe, and this is mistral)"
    assert caplog.messages[-1] == f"quantize: the progress of gptqmodel so far is {lost}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_gptq_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint is kept, but not one whose result failed its proof: it would fail again."""
    caplog.set_level("INFO", "edgepress")
    (tmp_path / "x" / "checkpoint").mkdir(parents=True)
    (tmp_path / "x" / "checkpoint" / "CURRENT").touch()
    isolated.leave(tmp_path / "x", "gptq", isolated.Begun(28, gptqmodel.CHECKPOINT), resumable=True)
    assert (tmp_path / "x").exists() and "is kept in" in caplog.messages[-1]
    isolated.leave(tmp_path / "x", "gptq", isolated.Begun(28, gptqmodel.CHECKPOINT), resumable=False)
    assert not (tmp_path / "x").exists() and len(caplog.messages) == 1


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="finds the child in /proc")
@pytest.mark.parametrize(("method", "progress"), [("gptq", gptq.STATES), ("gptqmodel", gptqmodel.CHECKPOINT)])
@pytest.mark.families
def test_gptq_killed_outright_goes_on_and_leaves_no_process(
    method: str, progress: str, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """SIGKILL cannot be caught: the child must see for itself that its parent is gone, and the layers done are not lost.

    The resumed result is that of an uninterrupted run, array for array.
    """
    out, scratch = tmp_path / "packed", tmp_path / f".packed.{method}"
    command = [sys.executable, "-c", STAGE, method, *map(str, (tiny, out, text))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (scratch / progress).is_file() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        finally:
            process.kill()
    assert children and (scratch / progress).is_file() and not out.exists()
    deadline = time.monotonic() + 20
    while any(alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in children)

    assert subprocess.run(command, capture_output=True, timeout=HUNG).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    command[-2] = str(tmp_path / "whole")
    assert subprocess.run(command, capture_output=True, timeout=HUNG).returncode == 0
    resumed, whole = PackedFile(out), PackedFile(tmp_path / "whole")
    for name, linear in whole.items():
        for part in ("codes", "scales", "zeros"):
            assert np.array_equal(getattr(resumed[name], part), getattr(linear, part)), (name, part)


COUNTING = """
import time
from edgepress.pipeline.progress import progress

def count(most):
    for _ in progress(range(most), "counting", "number"):
        time.sleep(0.6)
    return most
"""


def test_a_bar_of_the_isolated_process_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing bits takes minutes: what it counts there is counted on the terminal here, and taken away at its end."""
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    told: list[tuple] = []
    monkeypatch.setattr(isolated.Mirror, "show", lambda self, shown: told.append(shown))
    assert isolated.run_isolated("counting:count", (3,), "work", tmp_path / "scratch") == 3
    assert [told[0][index] for index in (0, 2, 3)] == ["counting", 3, "number"] and told[-1] == ENDED
    assert max(done for _, done, *_ in told) >= 2


def test_a_mirror_follows() -> None:
    """One bar at a time, as long as there is something to show."""
    mirror = Mirror()
    mirror.show(("counting", 2, 3, "number"))
    first = mirror._bar
    mirror.show(("counting", 3, 3, "number"))
    assert first is not None and mirror._bar is first and first.total == 3
    mirror.show(("weighing", 0, None, "gram"))
    assert mirror._bar is not first and mirror._bar is not None
    mirror.show(ENDED)
    assert mirror._bar is None
