"""`edgepress sweep`: what its file may say, and builds that survive the loss of workers and of the driver."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from edgepress.pipeline.files import read_json, sha256
from edgepress.pipeline.report.comparison import labels
from edgepress.pipeline.report.model import read as read_report
from edgepress.pipeline.sweep.builds import read
from edgepress.pipeline.sweep.work import build, measure
from gguf import GGMLQuantizationType
from gguf_files import write_gguf

REFUSED = [
    ("recipes: [default]", "must name models"),
    ("models: []", "empty list of models"),
    ("models: [reference]\nmodles: [x]", "no use for 'modles' (did you mean 'models'?)"),
    ("models: reference", "models"),
    ("models: [./no/such/folder]", "no such folder"),
    ("models: [reference]\nrecipes: [none-such]", "no recipe 'none-such'"),
    ("models: [reference]\nbudgets: [{max_size: lots}]", "max-size takes a size"),
    ("models: [reference]\nbudgets: [{max_size: 9MB, bits: 4}]", "bits"),
    ("models: [reference]\nbudgets: [{min_speed: 9, bits: 4}]", "--min-speed chooses the bits"),
    ("models: [reference]\nbudgets: [{colour: red}]", "colour"),
    ("models: [reference]\nbench: {repeats: 0}", "repeats"),
    ("models: [reference]\nbudgets: [{bits: 4}, {bits: 4}]", "twice"),
    ("models: [reference]\nbudgets: [{repeats: 9}]", "takes repeats"),
    ("models: [reference]\nbench: {reference: x}", "itself tells bench reference"),
    ("models: [reference]\nbench: {text: no-such.txt}", "no-such.txt"),
    ("models: [reference]\nbench: {threads: 1}\nbudgets: [{max_ttft: 90}]", "planned with all threads"),
    ("models: [reference]\nrecipes: [half.yaml]", "has no export"),
    ("models: [{a: 1}]", "correct"),
    ("{", "correct it"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_file_that_says_nothing_sensible(text: str, reason: str, tmp_path: Path, call: Callable) -> None:
    """Refused before anything is built, in one line."""
    (tmp_path / "half.yaml").write_text("quantize: {method: rtn}")
    (tmp_path / "sweep.yaml").write_text(text)
    result = call("sweep", tmp_path / "sweep.yaml", tmp_path / "out")
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--ray-address", "127.0.0.1:1"), "nothing answers at 127.0.0.1:1"),
        (("--ray-address", "here"), "takes HOST:PORT"),
        (("--memory", "much"), "--memory takes a size"),
        (("--cores", "-1"), "--cores"),
    ],
)
def test_a_cluster_that_is_not_there(flags: tuple[str, ...], reason: str, tmp_path: Path, call: Callable) -> None:
    (tmp_path / "sweep.yaml").write_text("models: [reference]")
    result = call("sweep", tmp_path / "sweep.yaml", tmp_path / "out", *flags)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1, result.err


def test_without_ray(tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep.yaml").write_text("models: [reference]")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    result = call("sweep", tmp_path / "sweep.yaml", tmp_path / "out")
    assert result.code == 2 and "ray is not installed" in result.err and "[sweep]" in result.err


def test_every_model_by_every_recipe_within_every_budget(tmp_path: Path, tiny: Path) -> None:
    """In the order of the file; a recipe beside it is found, and speed bounds ask for a machine of their own."""
    (tmp_path / "mine.yaml").write_text("quantize: {method: rtn}\nexport: {}")
    (tmp_path / "sweep.yaml").write_text(
        f"models: [reference, {tiny}]\nrecipes: [default, mine.yaml]\n"
        "budgets: [{}, {max-size: 9MB, method: rtn}, {min_speed: 30}]\nbench: {repeats: 2}"
    )
    sweep = read(tmp_path / "sweep.yaml")
    assert len({wanted.name for wanted in sweep.builds}) == 12 and list(sweep.sets) == ["reference", tiny.name]
    assert sweep.builds[3].recipe == str(tmp_path / "mine.yaml") and all(wanted.original.is_absolute() for wanted in sweep.builds)
    assert [wanted.name for wanted in sweep.builds[:3]] == [
        "reference-default", "reference-default-max-size-9MB-method-rtn", "reference-default-min-speed-30",
    ]  # fmt: skip
    assert [wanted.alone for wanted in sweep.builds[:3]] == [False, False, True]
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "far.yaml").write_text("models: [reference]\nbudgets: [{min_speed: 30, machine: there.json}]\nbench: {threads: 1}")
    (far,) = read(tmp_path / "far.yaml").builds  # measured elsewhere, before: any place will do
    assert not far.alone and far.flags["machine"] == str(tmp_path / "there.json")
    assert [name for name, _ in sweep.builds[3].plan()[0]] == ["quantize", "export"] and sweep.bench == {"repeats": 2}
    assert all(name != "bench" for wanted in sweep.builds for name, _ in wanted.plan()[0])


def test_names_are_those_of_folders(tmp_path: Path, tiny: Path) -> None:
    """Short, all different, unlike a stage's; and what has other tokens is measured apart."""
    models = [tmp_path / name for name in ("a_b", "a-b", "01-prune", "x" * 150)]
    for model in models:
        shutil.copytree(tiny, model)
    (tmp_path / "sweep.yaml").write_text("models: [a_b, a-b, ./01-prune, " + "x" * 150 + "]\nbudgets: [{}, {keep_tokens: 300}]")
    sweep = read(tmp_path / "sweep.yaml")
    names = [wanted.name for wanted in sweep.builds]
    assert len(set(names)) == 8 and all(len(name) < 120 for name in names) and names[4] == "model-01-prune-default"
    assert labels([tmp_path / "out" / name / "04-export" for name in names]) == names
    assert len(sweep.sets) == 8 and [len(builds) for builds in sweep.sets.values()] == [1] * 8
    assert [wanted.trimmed for wanted in sweep.builds] == [False, True] * 4


def test_a_gguf_whose_codes_are_kept_is_built_itself(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its import is, once for all builds; it is compared with that in either case."""
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny, tmp_path / "small.gguf", GGMLQuantizationType.Q4_0)
    (tmp_path / "sweep.yaml").write_text("models: [small.gguf]\nrecipes: [codes, default]")
    codes, plain = read(tmp_path / "sweep.yaml").builds
    assert codes.source == tmp_path / "small.gguf" and plain.source == plain.original == codes.original
    assert "imports" in plain.original.parts


def test_where_nothing_could_be_built(tiny: Path, tmp_path: Path, edgepress: Callable) -> None:
    """By Ray, from another folder than its workers': each build says why, and nobody waits for a measuring."""
    (tmp_path / "sweep.yaml").write_text(f"models: [{tiny}]\nbudgets: [{{max_size: 1KB, method: rtn, remove_count: 0}}]")
    result = edgepress("sweep", "sweep.yaml", "out", cwd=tmp_path)
    assert result.code == 2, result.err
    assert "--max-size 1KB" in result.out and result.err.splitlines()[-1].startswith("error: 1 of 1 failed")
    assert (tmp_path / "out" / "logs" / f"{tiny.name}-default-max-size-1KB-method-rtn-remove-count-0.log").is_file()
    assert "Traceback" not in result.err + result.out


def test_what_a_worker_does(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Builds, says why it could not, and measures what was built beside one another."""
    (tmp_path / "mine.yaml").write_text(f"quantize: {{method: rtn, group_size: 32}}\nexport: {{text: {text}}}")
    (tmp_path / "sweep.yaml").write_text(
        f"models: [{tiny}]\nrecipes: [mine.yaml]\nbudgets: [{{}}, {{bits: 8}}, {{max_size: 1KB}}]\n"
        f"bench: {{repeats: 1, text: {text}, text_tokens: 128, new_tokens: 8, prompt_lengths: 16, original_speed: false}}"
    )
    sweep = read(tmp_path / "sweep.yaml")
    done = [build(wanted, tmp_path / "out" / wanted.name, tmp_path / "logs" / wanted.name) for wanted in sweep.builds]
    assert [end.failed == "" for end in done] == [True, True, False] and "--max-size" in done[2].failed
    wrote = tuple(end.wrote for end in done[:2] if end.wrote)
    assert all(path.name == "02-export" for path in wrote)
    assert "export: done" in (tmp_path / "logs" / sweep.builds[0].name).read_text()
    end = measure(tiny, wrote, sweep.bench, tmp_path / "measured", tmp_path / "logs" / "measured")
    assert end.wrote is not None, end.failed
    reports = read_report(end.wrote / "report.json").reports
    assert [report.artifact for report in reports] == [wanted.name for wanted in sweep.builds[:2]]
    assert all("quality.kl_mean" in report.figures for report in reports)


SWEEP = """
models: [reference]
recipes: [mine.yaml]
budgets: [{bits: 4}, {bits: 8}, {bits: 4, group_size: 32}, {bits: 4, symmetric: true}, {bits: 8, head_bits: 16},
          {bits: 4, head_bits: 4}, {bits: 2, group_size: 64}, {max_size: 9MB}]
bench: {repeats: 1, text_tokens: 512, original_speed: false}
"""


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """The address of a Ray of two nodes, of one core each, on this machine."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


def workers() -> list[int]:
    """Process ids of the workers that build, of the Ray that this process began."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::build" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.families
def test_a_worker_and_the_driver_are_killed(two_nodes: str, tmp_path: Path) -> None:
    """On two nodes: what a lost worker did is done again, a killed sweep goes on, and nothing is lost or made twice."""
    (tmp_path / "mine.yaml").write_text("quantize: {method: rtn}\nexport: {}")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "edgepress.pipeline.cli", "sweep", str(tmp_path / "sweep.yaml"), str(out),
               "--ray-address", two_nodes, "--cores", "1"]  # fmt: skip
    killed = False
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "of 8," in line and not killed and (pids := workers()):
                os.kill(pids[0], signal.SIGKILL)
                killed = True
            if "(3 of 8" in line:
                break
        first.kill()  # the driver, without a chance to clean up
    assert killed
    finished = {file: sha256(file) for file in out.glob("builds/*/02-export/manifest.json")}
    assert 3 <= len(finished) < 8
    deadline = time.monotonic() + 60  # Ray ends the workers of a driver that is gone
    while workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not workers()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert all(sha256(file) == hashed for file, hashed in finished.items())  # kept, not made anew
    assert len(list(out.glob("builds/*/02-export/manifest.json"))) == 8
    names = [wanted.name for wanted in read(tmp_path / "sweep.yaml").builds]
    rows = [line.split()[0] for line in again.stdout.splitlines() if line.startswith("reference-")]
    assert rows == names and "not measured" not in again.stdout and (out / "sweep.html").is_file()
    report = read_json(out / "measured" / "reference" / "report.json")
    assert 1 + len(report["compared_with"]) == 8
