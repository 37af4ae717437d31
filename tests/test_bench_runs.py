"""Benchmarks that run: several artifacts in turn, killed and resumed, crashed beside others, damaged, on a missing GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.process import measured
from edgepress.pipeline.errors import InputError, MissingPackageError
from edgepress.pipeline.files import read_json, sha256
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime import targets

SHORT = ["--repeats", "2", "--prompt-lengths", "8", "--new-tokens", "4", "--text-tokens", "256"]
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def build(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a build without its benchmark."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    pruned = stages.run(
        "prune", Artifact.load(tiny), out / "01-prune", PruneOptions(remove_count=1, calibration=text, calibration_tokens=512)
    )
    packed = stages.run("quantize", pruned, out / "03-quantize", QuantizeOptions(method="rtn", group_size=32))
    stages.run("export", packed, out / "04-export", ExportOptions(text=text, accuracy_level="4", min_agreement=0))
    return out


def copy_artifact(source: Path, target: Path, changes: Callable[[Path], None] = lambda folder: None) -> Path:
    """A copy that its manifest calls whole, whatever was changed in it."""
    shutil.copytree(source, target)
    changes(target)
    manifest = read_json(target / "manifest.json")
    for name, known in manifest["files"].items():
        known["sha256"] = sha256(target / name)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


# --- several at once


@pytest.fixture(scope="module")
def compared(build: Path, tiny: Path, text: Path, edgepress: Call, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The artifact, a damaged copy, and one that is killed while it is measured; in one benchmark."""
    folder = tmp_path_factory.mktemp("compared")

    def one_scale(copy: Path) -> None:
        """The scale of one group of one matrix, found by its value, is halved."""
        from edgepress.pipeline.checkpoint.packed import PackedFile

        packed = PackedFile(build / "03-quantize")
        scales = packed["model.layers.1.mlp.down_proj"].scales
        data = bytearray((copy / "model.onnx.data").read_bytes())
        place = data.find(scales.astype("<f4").tobytes())
        assert place >= 0
        value = np.frombuffer(bytes(data[place : place + 4]), "<f4")[0]
        data[place : place + 4] = np.float32(value / 2).tobytes()
        (copy / "model.onnx.data").write_bytes(data)

    # beside their checkpoints, as in a build, so that their stages are found
    shutil.copytree(build, folder / "damaged")
    shutil.rmtree(folder / "damaged" / "04-export")
    damaged = copy_artifact(build / "04-export", folder / "damaged" / "04-export", one_scale)
    killed = copy_artifact(build / "04-export", folder / "killed", lambda copy: (copy / "killed").write_text("x"))
    out = folder / "report"
    arguments = ["bench", build, damaged, killed, "--reference", tiny, "--text", text, "--out", out, *SHORT]
    return edgepress(*arguments, env=killer(folder, "killed")), out


def killer(folder: Path, name: str) -> dict[str, str]:
    """Environment in which a measuring process that opens a file of the folder ``name`` kills itself, as for want of memory."""
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, signal, sys
            def watch(event, arguments):
                if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and "/{name}/" in str(arguments[0]):
                    os.kill(os.getpid(), signal.SIGKILL)
            if "edgepress.pipeline.bench.worker" in sys.orig_argv:
                sys.addaudithook(watch)
        """)
    )
    return {"PYTHONPATH": str(folder)}


def test_crash_is_reported_beside_the_others(compared: tuple[Any, Path]) -> None:
    result, out = compared
    assert result.code == 0, result.err
    killed = read_json(out / "report.json")["beside"][1]
    assert "want of memory" in killed["failed"]["speed"] and "want of memory" in killed["failed"]["quality"]
    assert not [name for name in killed["figures"] if name.startswith(("speed", "memory", "quality"))]
    assert killed["stages"][-1]["failed"]
    assert "killed could not be measured (speed)" in (out / "report.md").read_text().splitlines()[2]
    assert "Traceback" not in result.err


def test_others_are_compared_round_by_round(compared: tuple[Any, Path]) -> None:
    content = read_json(compared[1] / "report.json")
    assert {c["artifact"] for c in content["comparisons"]} == {"damaged"}
    for comparison in content["comparisons"]:
        assert comparison["rounds"] == 2 and comparison["low"] <= comparison["ratio"] <= comparison["high"]
        assert comparison["verdict"] in ("faster", "slower", "larger", "smaller", "no difference shown")
    assert len({r["run"] for r in [content, *content["beside"]]}) == 1


def test_damaged_artifact_is_flagged_by_its_stage(compared: tuple[Any, Path]) -> None:
    """One scale of one group: perplexity hardly moves, and still the export is named, not the quantizer."""
    content = read_json(compared[1] / "report.json")
    whole, damaged = content["stages"], content["beside"][0]["stages"]
    assert [row["name"] for row in whole] == ["original", "pruned", "quantized", "onnx_level_0", "onnx"]
    assert not [row["name"] for row in whole if row["name"] == "onnx_level_0" and "suspect" in row]
    assert [row["name"] for row in damaged if "suspect" in row and "damaged" in row["suspect"]] == ["onnx_level_0"]
    assert "is suspect" in (compared[1] / "report.md").read_text()


def test_level_0_is_the_packed_checkpoint(compared: tuple[Any, Path]) -> None:
    """What the export must not lose, and each stage's change adds up to the whole."""
    rows = {row["name"]: row for row in read_json(compared[1] / "report.json")["stages"]}
    assert rows["onnx_level_0"]["perplexity"] == pytest.approx(rows["quantized"]["perplexity"], rel=1e-5)
    whole = np.log(rows["onnx"]["perplexity"] / rows["original"]["perplexity"])
    assert sum(row.get("change_nats", 0) for row in rows.values()) == pytest.approx(whole, abs=1e-5)
    assert rows["original"]["kl_mean"] == 0 and rows["original"]["top1_agreement"] == 1


def test_page_is_written_and_gathered(compared: tuple[Any, Path], call: Call, tmp_path: Path) -> None:
    page = (compared[1] / "report.html").read_text()
    assert "<svg" in page and "could not be measured" in page
    assert call("report", compared[1], "--out", tmp_path / "all.html").code == 0
    assert (tmp_path / "all.html").read_text().count("<h3>") == page.count("<h3>")


def test_alone_a_crash_is_one_line(build: Path, text: Path, edgepress: Call, tmp_path: Path) -> None:
    artifact = copy_artifact(build / "04-export", tmp_path / "killed", lambda copy: (copy / "killed").write_text("x"))
    result = edgepress("bench", artifact, "--text", text, "--out", tmp_path / "out", *SHORT, env=killer(tmp_path, "killed"))
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert "want of memory" in result.err.splitlines()[-1] and "Traceback" not in result.err


# --- resuming


def test_killed_benchmark_goes_on(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Killed after its second round: the rounds done are not measured again, and the figures have all samples."""
    code = """
import os, signal, sys
from edgepress.pipeline.bench import speed as bench, journal as measure
from edgepress.pipeline.cli import commands as cli
real, rounds = bench._round, []
def counted(*arguments):
    rounds.append(1)
    if sys.argv[1] == "kill" and len(rounds) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
bench._round = counted
code = cli.main(sys.argv[2:])
print("rounds", len(rounds))
sys.exit(code)
"""
    out = tmp_path / "out"
    arguments = ["bench", str(build), "--text", str(text), "--out", str(out), *SHORT, "--repeats", "3"]
    killed = subprocess.run([sys.executable, "-c", code, "kill", *arguments], capture_output=True, text=True)
    assert killed.returncode < 0
    journal = tmp_path / ".out.measured.jsonl"
    assert len([line for line in journal.read_text().splitlines() if line]) == 2
    samples = [json.loads(line)[1]["0"]["load_s"] for line in journal.read_text().splitlines() if line]
    with journal.open("a") as file:
        file.write('["cut short by')  # as a kill in the middle of a line leaves it

    done = subprocess.run([sys.executable, "-c", code, "go", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on with 2 finished measurements" in done.stderr and "rounds 1" in done.stdout
    figures = read_json(out / "report.json")["figures"]
    assert figures["load.warm_s"]["values"][:2] == pytest.approx(samples) and len(figures["load.warm_s"]["values"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_journal_holds_what_depends_on_the_same(tmp_path: Path) -> None:
    """Another artifact, option or machine is measured again."""
    file = tmp_path / "journal"
    assert Journal(file, machine="a").once(lambda: 1, "round", 0) == 1
    assert Journal(file, machine="a").once(lambda: 2, "round", 0) == 1
    assert Journal(file, machine="b").once(lambda: 3, "round", 0) == 3
    assert Journal(file, machine="a").once(lambda: 4, "round", 1) == 4


# --- figures


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
    found = json.loads(done.stdout.splitlines()[0])
    assert found["peak_rss_bytes"] == pytest.approx(outside, rel=0.05)
    assert 0 < found["peak_pss_bytes"] <= 1.05 * found["peak_rss_bytes"]


def test_cold_load_reads_from_the_disk_or_says_why_not(build: Path) -> None:
    found = measured("cold", {"folder": str(build / "04-export"), "threads": 1})
    assert set(found) == {"load_s"} or "page cache" in found["reason"] or "tell" in found["reason"] or "posix" in found["reason"]


def test_bandwidth_is_that_of_a_memory(build: Path) -> None:
    """Neither a cache's nor a disk's."""
    assert 1e9 < measured("bandwidth", {"threads": 1})["bytes_per_s"] < 1e12


def test_bytes_per_token_leave_out_the_embedding(build: Path) -> None:
    """Untied: the embedding is 5120 x 64 bytes and their scales, of which a step reads one row."""
    facts = Artifact.load(build / "04-export").steps[-1].facts
    stored = (build / "04-export" / "model.onnx.data").stat().st_size
    assert facts["weight_bytes_per_token"] < stored - 5120 * 64 + 4096
    assert facts["weight_bytes_per_token"] > 0.9 * (stored - 5120 * (64 + 2 * 5) - 2 * 4 * 256 * 16)
    assert isinstance(facts["parameters"], int) and facts["parameters"] > 5120 * 64


# --- CUDA, where there is none


def test_cuda_names_the_missing_package(build: Path, text: Path, call: Call, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    result = call("bench", build, "--target", "cuda", "--text", text, "--out", tmp_path / "out", *SHORT)
    assert result.code == 2 and "onnxruntime-gpu is not installed" in result.err and "pip install '.[cuda]'" in result.err
    assert not list(tmp_path.iterdir())


def test_cuda_names_the_missing_gpu_and_the_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a session that quietly fell back to the CPU is refused: its figures would pass for the GPU's."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(targets, "gpus", lambda: [])
    with pytest.raises(InputError, match="no NVIDIA GPU is visible"):
        targets.target("cuda")
    monkeypatch.setattr(targets, "gpus", lambda: ["a GPU"])

    class Session:
        def __init__(self, model: str, options: object, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(InputError, match="would have run on the CPU"):
        targets.session("model.onnx", None, "cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingPackageError, match="onnxruntime-gpu"):
        targets.target("cuda")


def test_gpu_memory_is_this_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the driver tells it; a process that it knows under another number is not guessed at."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{os.getpid()}, 300'\necho '1, 9000'\necho '{os.getpid()}, 12'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert targets.gpu_memory() == 312 << 20
    assert targets.gpu_memory(2) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert targets.gpu_memory() is None and targets.gpus() == []
