"""What runs in a worker: one build, or the measuring of all artifacts of a model. No word of Ray."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import EdgepressError
from edgepress.pipeline.files import PLAN
from edgepress.pipeline.flags import make
from edgepress.pipeline.lock import writing
from edgepress.pipeline.machine import working_within
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.sweep.builds import Build, Flags
from edgepress.pipeline.visible import one_line


@dataclass(frozen=True)
class Done:
    """How it ended: what was written, or why not in one line; seconds that it took."""

    seconds: float
    wrote: Path | None = None
    failed: str = ""


def build(wanted: Build, out: Path, log: Path, memory: int | None = None) -> Done:
    """Build into ``out``; stages that are done already are kept. What it says goes to the end of ``log``.

    memory: bytes that weights may take; None for half of what is free.
    """
    begun = time.monotonic()
    try:
        # children of a worker that was killed need a moment to see it
        with _logged(log), writing(out, build=True, wait=True), working_within(memory):
            steps, bounds = wanted.plan()
            artifact = recipe.shipped_artifact(recipe.build(wanted.source, out, steps, bounds))
    except Exception as error:
        return Done(time.monotonic() - begun, failed=_reason(error, log))
    return Done(time.monotonic() - begun, artifact.path)


def measure(original: Path, artifacts: tuple[Path, ...], bench: Flags, out: Path, log: Path) -> Done:
    """Measure artifacts in turn, and compare each with the original; an interrupted run goes on."""
    begun = time.monotonic()
    first, *others = artifacts
    plans = tuple(plan for path in artifacts if (plan := path.parent / PLAN).is_file())
    try:
        with _logged(log):
            options = make(BenchOptions, {**bench, "reference": original, "compare_with": tuple(others), "plans": plans})
            report = stages.run("bench", Artifact.load(first), out, options, wait=True)
    except Exception as error:
        return Done(time.monotonic() - begun, failed=_reason(error, log))
    return Done(time.monotonic() - begun, report.path)


def _reason(error: Exception, log: Path) -> str:
    """In one line; the whole of what nobody expected goes to the end of ``log``, for the driver has none of it."""
    if isinstance(error, EdgepressError):
        return one_line(str(error))
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return one_line(f"{type(error).__name__}: {error}; {log} has more")


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """Within the context, what edgepress says goes to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    logger, handler = logging.getLogger("edgepress"), logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    former = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(former[0])
        logger.propagate = former[1]
