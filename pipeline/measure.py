"""Measuring processes, and the journal that outlives them: what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgepress.pipeline.artifact import write_json
from edgepress.pipeline.errors import WorkerError


def events(kind: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a fresh measuring process answers, object by object. Raises WorkerError when it crashes or is killed."""
    with (
        tempfile.TemporaryDirectory(prefix="edgepress-bench-") as scratch,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        file = Path(scratch) / "job.json"
        write_json(file, job)
        command = [sys.executable, "-m", "edgepress.pipeline.worker", kind, str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8")
        error = None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                if "error" in event:
                    error = event["error"]
                else:
                    yield event
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if code:
            stderr.seek(0)
            raise WorkerError(error or _reason(code, stderr.read()))


def measured(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """The one answer of a measuring process."""
    return list(events(kind, job))[-1]


def _reason(code: int, stderr: str) -> str:
    if os.name == "posix" and code == -signal.SIGKILL:
        return "killed by the system, most likely for want of memory (SIGKILL)"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return f"failed: {lines[-1].strip()}" if lines else f"failed with exit code {code}"


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
