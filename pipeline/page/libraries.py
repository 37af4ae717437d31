"""What runs a model in a browser: transformers.js and onnxruntime's WebAssembly build, from the npm registry, checked."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.errors import InputError, MissingPackageError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import read_json


@dataclass(frozen=True)
class Package:
    """One package. sha512: of its archive, in base64 as npm has it. files: those that a page needs, by their place in it."""

    name: str
    version: str
    sha512: str
    files: tuple[str, ...]


# onnxruntime-web is the version that this transformers.js asks for. Its smallest build: those for GPUs are twice its size.
PACKAGES = (
    Package(
        "@huggingface/transformers",
        "4.3.1",
        "5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
        ("dist/transformers.min.js", "LICENSE"),
    ),
    Package(
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        ("dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm"),
    ),
)


def libraries(modules: Path | None = None) -> list[Path]:
    """The files of PACKAGES, downloaded by npm into the cache folder unless they are there.

    modules: a node_modules folder to take them from instead. Raises InputError, MissingPackageError where npm is needed and absent.
    """
    found = []
    for package in PACKAGES:
        folder = _kept(package) if modules is None else _installed(package, modules / package.name)
        found += [folder / name for name in package.files]
    return found


def _is_whole(package: Package, folder: Path) -> bool:
    return all((folder / name).is_file() for name in package.files)


def _installed(package: Package, folder: Path) -> Path:
    """The folder of a package that npm installed. Raises InputError unless it is whole and of the version that was tried."""
    cure = f"npm install {package.name}@{package.version}, or leave --modules out"
    if not _is_whole(package, folder):
        raise InputError(f"{folder} is not there or not whole; {cure}")
    if (version := read_json(folder / "package.json").get("version")) != package.version:
        raise InputError(f"{folder} has version {version}, and {package.version} was tried; {cure}")
    return folder


def _kept(package: Package) -> Path:
    """The folder of a package in the cache."""
    folder = cache_folder() / "web" / f"{package.name.replace('/', '-')}-{package.version}"
    if _is_whole(package, folder):
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise MissingPackageError(
            f"{package.name} is downloaded by npm, which is not there; install Node.js, or give --modules a node_modules folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel", "error"]
        command += ["--pack-destination", scratch]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), "npm failed")
            raise InputError(f"cannot download {package.name} ({reason}); go online and try again")
        content = archives[0].read_bytes()
        if base64.b64encode(hashlib.sha512(content).digest()).decode() != package.sha512:
            raise InputError(f"what the registry sent for {package.name} is not the file it should be (sha512); try again later")
        whole = Path(scratch) / "whole"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(whole, [archive.getmember(f"package/{name}") for name in package.files], filter="data")
        if not _is_whole(package, folder):  # by another process, in the meantime
            shutil.rmtree(folder, ignore_errors=True)
            (whole / "package").rename(folder)
    return folder
