"""A benchmark that is killed is resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from edgepress.pipeline.bench.jobs import Bandwidth, ColdSample, QualityJob, Round, Sample, ScoringRow, SpeedSample
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.documents import typed
from edgepress.pipeline.files import read_json
from edgepress.pipeline.report.plain import object_of

SHORT = ["--prompt-lengths", "8", "--new-tokens", "4", "--text-tokens", "256"]


def test_killed_benchmark_goes_on(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Killed after its second round: the rounds done are not measured again, and the figures have all samples."""
    code = """
import os, signal, sys
from edgepress.pipeline.bench import speed as bench
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
    samples = [json.loads(line)[1]["samples"]["0"]["speed"]["load_s"] for line in journal.read_text().splitlines() if line]
    with journal.open("a") as file:
        file.write('["cut short by')  # as a kill in the middle of a line leaves it

    done = subprocess.run([sys.executable, "-c", code, "go", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming an interrupted run with 2 finished measurements" in done.stderr and "rounds 1" in done.stdout
    figures = read_json(out / "report.json")["figures"]
    assert figures["load.warm_s"]["values"][:2] == pytest.approx(samples) and len(figures["load.warm_s"]["values"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_journal_holds_what_depends_on_the_same(tmp_path: Path) -> None:
    """Another artifact, option or machine is measured again."""
    file = tmp_path / "journal"
    assert Journal(file, machine="a").once(int, lambda: 1, "round", 0) == 1
    assert Journal(file, machine="a").once(int, lambda: 2, "round", 0) == 1
    assert Journal(file, machine="b").once(int, lambda: 3, "round", 0) == 3
    assert Journal(file, machine="a").once(int, lambda: 4, "round", 1) == 4
    assert Journal(file, machine="a").once(Bandwidth, lambda: Bandwidth(5.0), "round", 0) == Bandwidth(5.0)  # kept as another type


RUBBISH = [
    "5",
    "[1]",
    "[[], 1]",
    '{"a": 1, "b": 2}',
    '"ab"',
    "null",
    "[{}, 2]",
    "[" * 100_000,
    '["k", {"figures": 5}]',
    "\0\0",
    "\udcff",
]


@pytest.mark.parametrize("line", RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_measured_again(line: str, tmp_path: Path) -> None:
    """Whatever a kill, a full disk or another program left, with what is whole around it kept."""
    file = tmp_path / "journal"
    assert Journal(file).once(int, lambda: 1, "round") == 1
    with file.open("a", errors="surrogateescape") as open_file:
        open_file.write(line)
    assert Journal(file).once(int, lambda: 2, "another") == 2
    journal = Journal(file)
    assert journal.once(int, lambda: 3, "round") == 1 and journal.once(int, lambda: 3, "another") == 2
    assert journal.once(Bandwidth, lambda: Bandwidth(4.0), "k") == Bandwidth(4.0)


def test_what_was_measured_comes_back_as_the_same_value(tmp_path: Path) -> None:
    """From the job's file and the journal's line: JSON has no tuples and no classes."""
    sample = Sample(SpeedSample(0.5, {"8": 0.25}, (1.0, 2.0), values={"memory.gpu_bytes": 3}), ColdSample(reason="no disk"))
    measured = Round(None, {"0": sample})
    key = Journal(tmp_path / "journal").key("round")
    Journal(tmp_path / "journal").put(key, measured)
    assert Journal(tmp_path / "journal").get(Round, key) == measured
    job = QualityJob(((1, 2), (3,)), None, (ScoringRow("k", "onnx", "folder"),), False, "cpu")
    assert typed(QualityJob, json.loads(json.dumps(object_of(job)))) == job
    with pytest.raises(ValueError, match="kind"):
        typed(ScoringRow, {"key": "k", "kind": "gguf", "folder": "folder"})
