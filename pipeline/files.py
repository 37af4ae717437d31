"""Files and folders: JSON, sha256, free disk space, and folders that are complete or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from edgepress.pipeline.documents import MAX_BYTES, DocumentError, JsonObject, parse_object
from edgepress.pipeline.errors import InputError, ModelError, OutputError

__all__ = [
    "MANIFEST", "WEIGHTS_BELOW", "JsonObject", "atomic_folder", "check_disk", "check_size", "files_below", "folder_bytes",
    "graph_files", "journal_of", "read_bytes", "read_json", "remove", "sha256", "write_json",
]  # fmt: skip
MANIFEST = "manifest.json"
PLAN = "plan.json"  # in the folder of a build: what it was expected to give, where it has bounds to keep to
WEIGHTS_BELOW = "onnx"  # where transformers.js looks for graphs


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file; InputError names the file when it is absent or not one (documents.py has the bounds)."""
    content = read_bytes(path)
    try:
        return parse_object(content)
    except DocumentError as error:
        raise InputError(f"{path} is {error}; correct it or replace it") from error


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A file's content. Raises InputError where ``check_size`` does, and for one that grows meanwhile."""
    check_size(path, most)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path} grew while it was read; leave it alone and start again")
    return content


def check_size(path: Path, most: int = MAX_BYTES) -> None:
    """Raise InputError for what is absent, no file, or larger than ``most`` bytes, before anything reads it whole."""
    check_file(path)
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path} is too large ({size:,} bytes; at most {most:,} are read); correct it or replace it")


def check_file(path: Path) -> None:
    """Raise InputError for what is absent, and for a pipe or a device, which may have no end."""
    if not path.exists():
        raise InputError(f"no such file: {path}; give the complete folder")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the complete folder")


def check_pointer(file: Path) -> None:
    """Raise ModelError for what git leaves in the place of a large file that git-LFS has not fetched."""
    if begins_with(file, b"version https://git-lfs.github.com/spec/"):
        raise ModelError(f"{file} is a git-LFS pointer, not the file itself; run 'git lfs pull' in its folder to replace it")


def begins_with(file: Path, mark: bytes) -> bool:
    """Whether a file's first bytes are these."""
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def is_measurement(file: Path) -> bool:
    """Whether ``edgepress sensitivity`` or ``machine`` wrote a file: then it is no part of the model beside which it lies."""
    with suppress(InputError):
        keys = read_json(file).keys() if begins_with(file, b'{\n  "model": "') else set[str]()
        return {"target_bits", "rows"} <= keys or {"made_of", "usages"} <= keys
    return False


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON with two spaces of indent and a final newline, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def discard_part(path: Path) -> None:
    """Remove what a killed ``write_whole`` left of a file, if it can be removed."""
    with suppress(OSError):
        _part(path).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there: whoever is killed leaves the former one, or none.

    A link stays one. What is there and no file, as /dev/null or a pipe, is written to and never replaced.
    """
    path = real(path)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = _part(path)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def expanded(path: str | Path) -> Path:
    """A path as the user means it: ``~`` is the home folder also where no shell says so, as in ``--text=~/a.txt``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: then a name that begins so
        return Path(path)


def real(path: Path) -> Path:
    """Where a path leads, absolute, by whatever links. Raises InputError for links that lead in a circle.

    What ``Path.resolve`` does with those differs between versions of Python.
    """
    place = Path(os.path.realpath(path))
    try:
        place.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{path} is, or lies behind, a link that leads back to itself; delete the link, or give another path"
            ) from error
    return place


def not_a_folder(path: Path) -> str:
    """What is wrong with a path where a folder was asked for."""
    return f"{path} is a file" if path.is_file() else f"no such folder: {path}"


_WORTH_KEEPING = 1 << 26  # bytes of a file whose digest is kept
_TICK = 3 * 10**9  # ns: longer than one of any file system's clock
_LARGE: dict[tuple[int, int, int, int], str] = {}  # digests, by ``_place``


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces.

    A large file is read once in a process as long as it stays as it is: every stage of a build asks for its source's.
    """
    with path.open("rb") as file:
        place = _place(file.fileno())
        if (known := _LARGE.get(place)) is not None:
            return known
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _, _, size, changed = place
        # one that changed just now could change again and show the same time
        if size >= _WORTH_KEEPING and place == _place(file.fileno()) and time.time_ns() - changed > _TICK:
            _LARGE[place] = digest
    return digest


def _place(file: int) -> tuple[int, int, int, int]:
    """Device, number, size and time of the last change, ns, of a file that is open."""
    about = os.fstat(file)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder except its manifest, sorted."""
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)


def hub_snapshot(folder: Path) -> Path | None:
    """The snapshot of the hub's cache that a folder is or, as a model in a folder of its repository, lies in."""
    root = Path(os.path.realpath(folder))
    return next(
        (p for p in (root, *root.parents) if p.parent.name == "snapshots" and p.parent.parent.name.startswith("models--")), None
    )


def leads_out(folder: Path, file: Path) -> bool:
    """Whether what ``file`` is a link to lies outside of ``folder``; the links of a hub cache to its own blobs do not count."""
    allowed = [Path(os.path.realpath(folder))]
    if snapshot := hub_snapshot(folder):
        allowed.append(Path(os.path.realpath(snapshot.parent.parent / "blobs")))
    return not any(Path(os.path.realpath(file)).is_relative_to(place) for place in allowed)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, the manifest left out; of a file, its own. What lies deeper is no part of a model.

    But for the weights of an artifact that is laid out for transformers.js.
    """
    if folder.is_file():
        return folder.stat().st_size
    files = {*(p for p in folder.iterdir() if p.is_file()), *graph_files(folder)} - {folder / MANIFEST}
    return sum(p.stat().st_size for p in files)


def graph_files(folder: Path) -> list[Path]:
    """The graphs of an artifact and their weights: beside it, or below ``WEIGHTS_BELOW``; of any other folder none."""
    if not (folder / "model.onnx").is_file():
        return []
    return [p for p in sorted([*folder.glob("model.onnx*"), *(folder / WEIGHTS_BELOW).glob("*")]) if p.is_file()]


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
        _open_to_all(partial)
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


def _open_to_all(folder: Path) -> None:
    """Weights get the permissions that a new file has: safetensors gives its files to the owner alone."""
    os.umask(mask := os.umask(0o22))
    for file in folder.glob("*.safetensors"):
        state = file.lstat()
        if stat.S_ISREG(state.st_mode) and stat.S_IMODE(state.st_mode) == 0o600 and state.st_nlink == 1:
            with suppress(OSError):  # a disk without permissions
                file.chmod(0o666 & ~mask)


def journal_of(out: Path) -> Path:
    """Where a stage that measures keeps what is finished, beside ``out`` (or its partial folder), until ``out`` is whole."""
    name = out.name.removeprefix(".").removesuffix(".partial")
    return out.parent / f".{name}.measured.jsonl"


def link_or_copy(source: Path, target: Path) -> None:
    """The same file in a second folder: a hard link, so that each folder is whole without the other; a copy on another disk.

    Only for a file that edgepress wrote and that nothing changes in place: whoever writes to one writes to both.
    """
    try:
        os.link(os.path.realpath(source), target)  # of a link, as all files in a hub cache are, it would link the link
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
            f"not enough disk space at {parent}: about {_size(needed)} needed, {_size(free)} free; "
            "free some or choose another output folder"
        )


def _size(count: int) -> str:
    """Bytes in words, in the unit that leaves a digit before the point."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit), (1, "bytes"))
    return f"{count} {name}" if unit == 1 else f"{count / unit:.1f} {name}"


def remove(folder: Path) -> None:
    """Delete a folder if it is there; of a link, the link alone."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
