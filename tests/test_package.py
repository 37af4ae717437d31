"""What is built is what is shipped: the wheel holds every module, recipe and the embedded model, and works by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files, without the network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_no_link_is_tracked() -> None:
    """One would lead to a place on somebody's machine; a folder that .gitignore names is no longer ignored as a link."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


def test_every_module_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    """A subpackage left off the list in pyproject.toml vanishes from the wheel without a word."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("pipeline", "exporters", "models"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"edgepress/{file.relative_to(ROOT)}" in names
    assert not {name.split("/")[0] for name in names} & {"pipeline", "exporters", "models", "tests"}


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """Not the checkout: unpacked elsewhere, run from elsewhere."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import edgepress.pipeline.cli as c, edgepress.models as m; print(c.__file__); c.main(['show', str(m.REFERENCE)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path)) and "llama" in done.stdout
