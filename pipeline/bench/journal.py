"""Finished measurements that outlive an interruption: what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from edgepress.pipeline.documents import DocumentError, parse_json, typed
from edgepress.pipeline.report.plain import to_plain

Value = TypeVar("Value")


class Journal:
    """Finished measurements, one JSON line each, next to the output until it is whole.

    A line is looked up by the hash of everything that it depends on, so that a resumed benchmark reuses exactly what
    the same artifact, options, machine and versions gave. A line that is broken, as by a kill, is ignored.
    """

    def __init__(self, file: Path, **common: object) -> None:
        """common: what all measurements depend on."""
        self._file, self._common = file, common
        self._known: dict[str, object] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, value = typed(tuple[str, object], parse_json(line), "line")
                except DocumentError:
                    continue
                self._known[key] = value
        self.resumed = len(self._known)

    def key(self, *depends: object) -> str:
        """Hash of plain data and dataclasses of it."""
        return hashlib.sha256(json.dumps(to_plain([self._common, depends]), sort_keys=True).encode()).hexdigest()

    def get(self, kind: type[Value], key: str) -> Value | None:
        """What was measured under a key, or None."""
        if key in self._known:
            with suppress(ValueError):  # written by another version: measured again
                return typed(kind, self._known[key])
        return None

    def put(self, key: str, value: Value) -> Value:
        """Keep a measurement, on the disk before this returns."""
        self._known[key] = to_plain(value)
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([key, self._known[key]]) + "\n")  # on a line of its own, whatever a kill left before it
            file.flush()
            os.fsync(file.fileno())
        return value

    def once(self, kind: type[Value], measure: Callable[[], Value], *depends: object) -> Value:
        """What ``measure`` gave before for the same dependencies, or gives now."""
        key = self.key(*depends)
        known = self.get(kind, key)
        return self.put(key, measure()) if known is None else known
