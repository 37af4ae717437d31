"""The measuring process: what it measures is its own, and nothing else is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench import launch
from edgepress.pipeline.bench.jobs import Bandwidth, BandwidthJob, ColdJob, ColdSample
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.errors import WorkerError


def test_memory_is_the_measured_process_alone() -> None:
    """A child of a big process must not report its parent's peak (ru_maxrss would: it survives exec)."""
    code = (
        "import subprocess, sys; ballast = bytearray(b'x' * (300 << 20));"
        "child = 'from edgepress.pipeline.bench.memory import peak_rss; print(peak_rss())';"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 << 20 < int(done.stdout) < 200 << 20


def test_the_measuring_process_loads_neither_torch_nor_transformers() -> None:
    """Its peak memory is reported as the artifact's: nothing else may be in it."""
    code = "import sys, edgepress.pipeline.bench.worker; print(sorted({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peak_memory_is_what_an_outside_measure_says(build: Path, tmp_path: Path) -> None:
    """/usr/bin/time -v, or the kernel's account of the child where that is absent; to 5 %."""
    job = {"folder": str(build / "04-export"), "ids": list(range(3, 35)), "prompt_lengths": [32], "new_tokens": 8, "threads": 1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "edgepress.pipeline.bench.worker", "speed", str(tmp_path / "job.json")]
    if Path("/usr/bin/time").exists():
        done = subprocess.run(["/usr/bin/time", "-v", *command], capture_output=True, text=True, check=True)
        line = next(line for line in done.stderr.splitlines() if "Maximum resident set size" in line)
        outside = 1024 * int(line.rpartition(" ")[2])
    else:
        # a small process between: a child's peak begins with its parent's
        between = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        between += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", between, *command], capture_output=True, text=True, check=True)
        outside = 1024 * int(done.stdout.splitlines()[-1])
    sample = json.loads(done.stdout.splitlines()[0])
    assert sample["values"]["memory.peak_rss_bytes"] == pytest.approx(outside, rel=0.05)
    assert 0 < sample["values"]["memory.peak_pss_bytes"] <= 1.05 * sample["values"]["memory.peak_rss_bytes"]


def test_cold_load_reads_from_the_disk_or_says_why_not(build: Path) -> None:
    sample = measured("cold", ColdJob(str(build / "04-export"), threads=1), ColdSample)
    assert sample.load_s is not None or any(word in sample.reason for word in ("page cache", "report", "posix"))


def test_bandwidth_is_that_of_a_memory() -> None:
    """Neither a cache's nor a disk's."""
    assert 1e9 < measured("bandwidth", BandwidthJob(threads=1), Bandwidth).bytes_per_s < 1e12


def test_bytes_per_token_leave_out_the_embedding(build: Path) -> None:
    """Untied: the embedding is 5120 x 64 bytes and their scales, of which a step reads one row."""
    facts = Artifact.load(build / "04-export").steps[-1].facts
    stored = (build / "04-export" / "model.onnx.data").stat().st_size
    assert facts["weight_bytes_per_token"] < stored - 5120 * 64 + 4096
    assert facts["weight_bytes_per_token"] > 0.9 * (stored - 5120 * (64 + 2 * 5) - 2 * 4 * 256 * 16)
    assert isinstance(facts["parameters"], int) and facts["parameters"] > 5120 * 64


def test_killed_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line is no answer, and how the process ended is the reason."""
    dies = "import os, signal, sys; print('{\"bytes', end='', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    real = subprocess.Popen
    monkeypatch.setattr(launch.subprocess, "Popen", lambda _, **rest: real([sys.executable, "-c", dies], **rest))
    with pytest.raises(WorkerError, match="SIGKILL"):
        measured("bandwidth", BandwidthJob(1), Bandwidth)


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that is killed outright, and cannot end it."""
    number = tmp_path / "number"
    child = (
        "import os, pathlib, time; from edgepress.pipeline.bench import worker; "
        f"worker.answers = lambda *_: (pathlib.Path({str(number)!r}).write_text(str(os.getpid())), time.sleep(60)); worker.main()"
    )
    parent = (
        "import subprocess, sys; from edgepress.pipeline.bench import jobs, launch; Real = subprocess.Popen; "
        f"launch.subprocess.Popen = lambda c, **rest: Real([c[0], '-c', {child!r}, *c[3:]], **rest); "
        "launch.measured('bandwidth', jobs.BandwidthJob(1), jobs.Bandwidth)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        _wait_until(lambda: number.is_file() and number.read_text() != "")
        process.kill()
    _wait_until(lambda: not _runs(int(number.read_text())))


def _wait_until(fulfilled: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.02)


def _runs(number: int) -> bool:
    """Whether a process runs; one that has ended and whose parent has not looked does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")
