"""Whether an artifact is what was written: its files are hashed when they are first loaded, and again when they have changed."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import MANIFEST, JsonObject, read_json, sha256, write_json

# Within this time of a change, a file system may give the next change the same time.
CLOCK_SECONDS = 2.0
# What a person may mean to edit.
EDITED = (".json", ".jinja", ".md", ".txt", ".py")


def check_whole(folder: Path) -> list[str]:
    """Compare the files of an artifact with its manifest. Raises InputError for a graph, weights or tokenizer that differ.

    Returns what is worth a warning once the artifact is loaded: configs and other text that differ, a missing manifest.
    """
    if not (folder / MANIFEST).is_file():
        return [f"{folder} has no {MANIFEST}, so its files cannot be checked"]
    seen, warnings = _Seen(), []
    for name, known in Artifact.load(folder).files.items():
        file = folder / name
        if seen.matches(file, known["sha256"]):
            continue
        fault = "differs from the manifest (sha256)" if file.is_file() else "is missing"
        if file.suffix not in EDITED or file.name == "tokenizer.json":
            raise InputError(f"{file} {fault}; copy the complete folder again or export again")
        warnings.append(f"{file} {fault}")
    seen.keep()
    return warnings


class _Seen:
    """Files that had a digest, each with what changes when it does: device, inode, size, times. Kept in the cache folder."""

    def __init__(self) -> None:
        self._known: JsonObject = {}
        self._cache: Path | None = None
        with suppress(InputError, OSError, RuntimeError):  # none yet, broken, or nobody's home
            self._cache = cache_folder() / "checked.json"
            self._known = read_json(self._cache)
        self._changed = False

    def matches(self, file: Path, digest: str) -> bool:
        """Whether a file is there and has this sha256."""
        if not file.is_file():
            return False
        status = file.stat()
        stamp = [digest, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        key = str(file.resolve())
        if self._known.get(key) == stamp:
            return True
        if sha256(file) != digest:
            return False
        if status.st_ctime < time.time() - CLOCK_SECONDS:
            self._known[key], self._changed = stamp, True
        return True

    def keep(self) -> None:
        """Write down what is new, where there is a place for it, and forget files that are gone."""
        if self._changed and self._cache is not None:
            known = {file: stamp for file, stamp in self._known.items() if Path(file).is_file()}
            with suppress(OSError, ValueError):  # a name that is no text
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._cache, known)
