"""Files and folders: JSON, sha256, free disk space, and folders that are complete or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgepress.pipeline.errors import InputError, OutputError

# What a JSON file holds whose keys are not ours: config.json of any model, tokenizer_config.json.
JsonObject = dict[str, Any]
MANIFEST = "manifest.json"


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file; InputError names the file when it is absent or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}; give the complete folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); correct it or fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object; correct it or fetch it again")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON with two spaces of indent and a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder except its manifest, sorted."""
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, the manifest left out; of a file, its own."""
    if folder.is_file():
        return folder.stat().st_size
    return sum(p.stat().st_size for p in files_below(folder))


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A fresh folder next to ``out`` to write into; renamed to ``out`` on success, removed on any failure.

    A former ``out`` is replaced as a whole: whoever calls checks first that it may be (artifact.check_free). Raises OutputError
    when the folder cannot be made.
    """
    partial = out.parent / f".{out.name}.partial"
    created = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            remove(partial)  # left by a killed run
            partial.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {out.parent}: {error.strerror}; choose another output folder") from error
        yield partial
        former = out.parent / f".{out.name}.former"
        remove(former)
        if out.exists():
            out.rename(former)
        partial.rename(out)
        remove(former)
    except BaseException:
        with suppress(OSError):  # what went wrong is said, not that its traces cannot be removed
            remove(partial)
        for parent in created:
            with suppress(OSError):  # other stages may have written there
                parent.rmdir()
        raise


def journal_of(out: Path) -> Path:
    """Where a stage that measures keeps what is finished, beside ``out`` (or its partial folder), until ``out`` is whole."""
    name = out.name.removeprefix(".").removesuffix(".partial")
    return out.parent / f".{name}.measured.jsonl"


def link_or_copy(source: Path, target: Path) -> None:
    """The same file in a second folder: a hard link, so that each folder is whole without the other; a copy on another disk.

    Only for a file that edgepress wrote and that nothing changes in place: whoever writes to one writes to both.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def check_disk(out: Path, needed: int) -> None:
    """Raise OutputError when the disk that will hold ``out`` has fewer than ``needed`` bytes free."""
    parent = next(p for p in [out, *out.absolute().parents] if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}: no permission; choose another output folder")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"not enough disk space at {parent}: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "free some or choose another output folder"
        )


def remove(folder: Path) -> None:
    """Delete a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
