"""Modules that lie in the working directory are never imported: it may be the folder of somebody's model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from edgepress.pipeline.bench.jobs import Bandwidth, BandwidthJob
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.search_path import child_environment, is_program, without_current_folder

PROGRAM = "import sys; sys.argv[0] = '/bin/edgepress'; from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules leave the file RAN when they are imported."""
    folder = tmp_path / "model"
    folder.mkdir()
    for module in ("numpy", "tokenizers", "hashlib", "argparse", "yaml", "jinja2", "onnxruntime"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\nraise ImportError('hostile')\n")
    return folder


@pytest.mark.parametrize("entry", [None, "", "."], ids=["not there", "empty", "dot"])
@pytest.mark.parametrize("start", [("-m", "edgepress.pipeline.cli"), ("-P", "-c", PROGRAM)], ids=["module", "script"])
def test_the_program(start: tuple[str, ...], entry: str | None, hostile: Path, tmp_path: Path) -> None:
    """An empty entry of PYTHONPATH, as ``PYTHONPATH=$PYTHONPATH:more`` makes, is the working directory, too."""
    path = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": path if entry is None else os.pathsep.join([entry, path, path])}
    command = [sys.executable, *start, "show", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=hostile, env=environment)
    assert done.returncode == 2 and "no config.json" in done.stderr, done.stderr
    assert not (tmp_path / "RAN").exists()


def test_the_measuring_process(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    assert measured("bandwidth", BandwidthJob(threads=1), Bandwidth).bytes_per_s > 0
    assert not (tmp_path / "RAN").exists()


def test_processes_of_a_child(hostile: Path, tmp_path: Path) -> None:
    """What a child starts in turn does not find them either."""
    code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import numpy']).returncode)"
    done = subprocess.run([sys.executable, "-c", code], cwd=hostile, env=child_environment())
    assert done.returncode == 0 and not (tmp_path / "RAN").exists()


def test_a_program_that_imports_edgepress_keeps_its_path() -> None:
    assert is_program(["-m"], ["python", "-m", "edgepress.pipeline.cli", "build"])
    assert is_program(["/venv/bin/edgepress", "run"], [])
    for argv, original in ((["-m"], ["python", "-m", "mine.tool"]), (["tool.py"], ["python", "tool.py"]), ([], []), (["-c"], [])):
        assert not is_program(argv, original)


def test_edgepress_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever works in the folder that holds edgepress itself imports from there anyway."""
    import edgepress.pipeline.search_path as module

    monkeypatch.chdir(tmp_path)
    assert without_current_folder(["", ".", str(tmp_path), "/other"]) == ["/other"]
    monkeypatch.chdir(Path(module.__file__).absolute().parents[2])
    assert without_current_folder([".", "/other"]) == [".", "/other"]
