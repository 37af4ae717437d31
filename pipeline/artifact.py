"""An artifact is a directory and its manifest: what it holds, how it came to be, and proof that it is whole.

Every stage is ``f(source: Artifact, out: Path, options) -> facts``; ``stages.run`` adds the manifest and returns the Artifact. A
directory is written beside its final name and renamed when complete, so what carries the final name is always whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict

from edgepress.pipeline.documents import DocumentError, short_line, shown, typed
from edgepress.pipeline.errors import InputError, OutputError
from edgepress.pipeline.files import (
    MANIFEST,
    JsonObject,
    files_below,
    is_measurement,
    leads_out,
    link_or_copy,
    not_a_folder,
    read_json,
    real,
    sha256,
    write_json,
)
from edgepress.pipeline.model_files import read_config

# Format of the manifest itself; a reader refuses a newer one.
MANIFEST_VERSION = 1
RECORDS = {"influence.json", "training.json"}  # of what stages did, beside a model
# Files that decide what a model computes, and of which text.
_OF_A_MODEL = (
    "*.safetensors", "*.bin", "*.json", "*.model", "merges.txt", "vocab.txt", "modeling_*.py", "configuration_*.py",
    "tokenization_*.py",
)  # fmt: skip
WEIGHTS = ".safetensors"
Format = Literal["gguf", "hf", "codes", "packed", "onnx", "report", "page"]


@dataclass(frozen=True)
class Step:
    """One stage that was run: ``facts`` is what it found (influences, bytes, parity); ``seconds`` wall clock."""

    stage: str
    options: JsonObject
    facts: JsonObject
    seconds: float
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if not self.stage.isidentifier():
            raise ValueError(f"{shown(self.stage)} is no stage")


class FileRecord(TypedDict):
    """What a manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Version:
    manifest_version: int = 0


@dataclass(frozen=True)
class _Manifest:
    """The keys of a manifest that are read. Raises ValueError for the name of a file that is not in its folder."""

    format: Format
    steps: tuple[Step, ...]
    fingerprint: str
    files: dict[str, FileRecord]

    def __post_init__(self) -> None:
        for name in self.files:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or not name.isprintable():
                raise ValueError(f"it lists {shown(name)}, which is no name of a file in its folder")


@dataclass(frozen=True)
class Artifact:
    """A directory that is usable alone.

    format: "gguf" (a file, the only one that is no directory), "hf" (Hugging Face checkpoint), "packed" (the same with
    packed.safetensors for its matrices), "codes" (packed as far as a GGUF's codes were kept, the rest yet to be quantized), "onnx"
    (model.onnx and what runs it), "report" (figures of one), "page" (one for browsers, with all that runs it there).
    steps: the stages behind it, first to last. fingerprint: what went in; "" for a directory we did not write.
    """

    path: Path
    format: Format
    steps: tuple[Step, ...] = ()
    fingerprint: str = ""
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """``model_type`` of its config."""
        return str(read_config(self.path).get("model_type", ""))

    @property
    def changed(self) -> bool:
        """Whether its last stage changed what the model computes: not an import, a removal of nothing, a refused healing."""
        if not self.steps:
            return True
        step = self.steps[-1]
        removed = step.facts.get("removed_layers", True) or step.facts.get("removed_parts")
        return step.stage != "import" and bool(removed) and bool(step.facts.get("accepted", True))

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read a directory: one of ours by its manifest, otherwise a plain Hugging Face checkpoint.

        Raises InputError when it is neither.
        """
        if path.is_file() and path.suffix == ".gguf":
            return cls(path, "gguf")
        if not path.is_dir():
            raise InputError(f"no such folder: {path}; give an artifact, a folder with config.json, a hub id, or 'reference'")
        if (path / MANIFEST).is_file():
            return cls._from_manifest(path)
        if not (path / "config.json").is_file():
            built = sorted(folder.name for folder in path.iterdir() if (folder / MANIFEST).is_file())
            if built:
                raise InputError(f"{path} is what a build made; give one of the folders in it: {', '.join(built)}")
            raise InputError(
                f"{path} has no config.json, so it is not a Hugging Face checkpoint; give the folder that holds config.json"
            )
        return cls(path, "hf")

    @classmethod
    def _from_manifest(cls, path: Path) -> Artifact:
        content = read_json(path / MANIFEST)
        try:
            if typed(_Version, content, "manifest").manifest_version > MANIFEST_VERSION:
                writer = short_line(str(content.get("edgepress")))
                raise InputError(f"{path} was written by a newer edgepress ({writer}); upgrade to read it")
            if not {"fingerprint", "steps", "files"} <= content.keys():
                raise InputError(
                    f"{path / MANIFEST} is not edgepress's; give a folder with config.json, or one that edgepress wrote"
                )
            manifest = typed(_Manifest, content, "manifest")
        except DocumentError as error:
            raise InputError(f"{path / MANIFEST} is damaged ({error}); delete the folder and build it again") from error
        for name in manifest.files:
            if leads_out(path, path / name):
                raise InputError(
                    f"{path / name} is a link that leads out of its folder; give a copy of the folder made with cp -rL"
                )
        return cls(path, manifest.format, manifest.steps, manifest.fingerprint, manifest.files)

    def damaged(self) -> list[str]:
        """Names of files that are missing or whose sha256 is not the manifest's."""
        return [
            name
            for name, known in self.files.items()
            if not (self.path / name).is_file() or sha256(self.path / name) != known["sha256"]
        ]

    @property
    def thinned(self) -> bool:
        """Whether its weights are gone."""
        return any(name.endswith(WEIGHTS) and not (self.path / name).exists() for name in self.files)

    def thin(self) -> None:
        """Remove its weights: what it was and how it came to be stays."""
        for name in self.files:
            if name.endswith(WEIGHTS):
                (self.path / name).unlink(missing_ok=True)

    def copy_to(self, out: Path, link: bool = False) -> None:
        """Copy the files that the manifest names into a folder, and nothing that lies beside them.

        link: as second names of the same files, for an ``out`` in which nothing is changed in place.
        """
        for name in self.files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (link_or_copy if link else shutil.copy2)(self.path / name, out / name)

    def identity(self) -> str:
        """Hash of the content: for ours of what the manifest records, for a plain checkpoint of every file (read once)."""
        return self._identity

    def model_identity(self) -> str:
        """The same of what decides what a model computes, so that what is known of one is known of a copy of it, too."""
        model = {name: hashed for name, hashed in self._hashes.items() if any(fnmatch(name, kind) for kind in _OF_A_MODEL)}
        model = {name: hashed for name, hashed in model.items() if name not in RECORDS}
        assert model, "a GGUF file is imported before anything is known of its model"
        return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _identity(self) -> str:
        return hashlib.sha256(json.dumps(self._hashes, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _hashes(self) -> dict[str, str]:
        if self.files:
            return {name: known["sha256"] for name, known in self.files.items()}
        if self.path.is_file():
            return {self.path.name: sha256(self.path)}
        files = (p for p in sorted(self.path.iterdir()) if p.is_file() and not p.name.startswith("."))
        return {p.name: sha256(p) for p in files if not is_measurement(p)}


def write_manifest(folder: Path, format: Format, steps: tuple[Step, ...], fingerprint: str) -> None:
    """Describe a finished folder; last act before the rename."""
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files_below(folder)}
    if not files:
        raise OutputError(f"{folder} was emptied while it was written; give each edgepress a folder of its own")
    content = {
        "manifest_version": MANIFEST_VERSION,
        "edgepress": steps[-1].versions.get("edgepress"),
        "format": format,
        "fingerprint": fingerprint,
        "steps": [asdict(step) for step in steps],
        "files": files,
    }
    write_json(folder / MANIFEST, content)


def check_free(out: Path) -> None:
    """Raise OutputError when ``out`` holds something that edgepress did not write, for it is replaced as a whole."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose another output folder")
    if out.is_dir() and real(out) == Path.cwd():
        raise OutputError(f"{out} is the current folder, which cannot be replaced; choose another output folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        known = Artifact.load(out).files
    except InputError:
        known = {}
    if not known and (inside := next(iter(sorted(out.glob(f"[0-9][0-9]-*/{MANIFEST}"))), None)):
        raise OutputError(f"{out} is the folder of a build, with {inside.parent.name} in it; choose another output folder")
    names = (str(p.relative_to(out)) for p in files_below(out) if not p.name.startswith("."))  # .DS_Store and its like
    foreign = next((name for name in names if name not in known), None)
    if not known or foreign:
        raise OutputError(f"{out} holds {foreign or MANIFEST}, which edgepress did not write there; choose another output folder")


def folder_of(path: Path) -> Path:
    """The folder of an artifact that is named by its model.onnx or its manifest.json; any other path is returned as it is."""
    return path.parent if path.name in ("model.onnx", MANIFEST) and path.is_file() else path


def onnx_folder(folder: Path) -> Path:
    """The folder with model.onnx: the one given (also by that file), or the one in it, when it is the OUT of a build.

    Raises InputError.
    """
    folder = folder_of(folder)
    if (folder / "model.onnx").is_file():
        return folder
    if folder.is_file() and folder.suffix == ".gguf":
        raise InputError(f"{folder} is a GGUF file; press it first: edgepress build {folder} OUT, then give OUT")
    if not folder.is_dir():
        raise InputError(f"{not_a_folder(folder)}; give the folder that edgepress export or build wrote")
    exported = sorted(folder.glob("*/model.onnx"))
    if not exported:
        raise InputError(f"no model.onnx in {folder}; give the folder that edgepress export or build wrote")
    return exported[-1].parent


def called(folder: Path) -> str:
    """What people call an artifact: by the OUT of a build where it is the export in it, else by its folder."""
    folder = folder.resolve()
    return folder.parent.name if folder.name.endswith("-export") and folder.parent.name else folder.name


def bench_folder(folder: Path) -> Path:
    """Where the benchmark of an artifact goes where nothing else is said: next to it, ``NAME-bench``."""
    return folder.parent / f"{real(folder).name}-bench"
