"""Starts a measuring process and reads its answers; what is measured, such as peak RSS, is in worker.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from edgepress.pipeline.bench.jobs import Job
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.files import write_json
from edgepress.pipeline.report.plain import object_of
from edgepress.pipeline.search_path import child_environment

Answer = TypeVar("Answer")


def events(kind: str, job: Job, answer: type[Answer]) -> Iterator[Answer]:
    """What a fresh measuring process answers, one by one. Raises WorkerError when it crashes or is killed."""
    with (
        tempfile.TemporaryDirectory(prefix="edgepress-bench-") as scratch,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        file = Path(scratch) / "job.json"
        write_json(file, object_of(job))
        process = subprocess.Popen(
            [sys.executable, "-m", "edgepress.pipeline.bench.worker", kind, str(file)],
            stdin=subprocess.PIPE,  # nothing is written to it: it ends with this process, and the other sees that
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            env=child_environment(),
        )
        error = None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.endswith("\n"):  # killed in the middle of it
                    break
                event = json.loads(line)
                if "error" in event:
                    error = event["error"]
                else:
                    yield typed(answer, event)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if code:
            stderr.seek(0)
            raise WorkerError(error or _reason(code, stderr.read()))


def measured(kind: str, job: Job, answer: type[Answer]) -> Answer:
    """The one answer of a measuring process. Raises WorkerError when it crashes or is killed."""
    return list(events(kind, job, answer))[-1]


def _reason(code: int, stderr: str) -> str:
    if os.name == "posix" and code == -signal.SIGKILL:
        return "killed by the system, most likely out of memory (SIGKILL)"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    return f"failed: {lines[-1].strip()}" if lines else f"failed with exit code {code}"
