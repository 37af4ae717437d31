"""Finished measurements that outlive an interruption: what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Finished measurements, one JSON line each, beside the output until it is whole.

    A line is looked up by the hash of everything that it depends on, so that a resumed benchmark reuses exactly what
    the same artifact, options, machine and versions gave. A line cut short by a kill is ignored.
    """

    def __init__(self, file: Path, **common: Any) -> None:
        """common: what all measurements depend on."""
        self._file, self._common = file, common
        self._known: dict[str, Any] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue
                self._known[key] = value
        self.resumed = len(self._known)

    def key(self, *depends: Any) -> str:
        """Hash of plain data."""
        return hashlib.sha256(json.dumps([self._common, depends], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """What was measured under a key, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Keep a measurement, on the disk before this returns."""
        self._known[key] = value
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([key, value]) + "\n")  # on a line of its own, whatever a kill left before it
            file.flush()
            os.fsync(file.fileno())
        return value

    def once(self, measure: Callable[[], Any], *depends: Any) -> Any:
        """What ``measure`` gave before for the same dependencies, or gives now."""
        key = self.key(*depends)
        found = self.get(key)
        return self.put(key, measure()) if found is None else found
