"""The driver: hands builds to Ray, which places them, and runs again what a lost worker did."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgepress.pipeline import interrupt
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import folder_bytes, real
from edgepress.pipeline.options import SweepOptions, size_in_bytes
from edgepress.pipeline.registry import require
from edgepress.pipeline.report.files import gather, save
from edgepress.pipeline.report.forecast import DECODE, MEMORY, SIZE
from edgepress.pipeline.report.model import ReportFile
from edgepress.pipeline.report.text import table as aligned
from edgepress.pipeline.sweep.builds import Sweep
from edgepress.pipeline.sweep.work import Done, build, measure
from edgepress.pipeline.visible import one_line

log = logging.getLogger("edgepress")
RETRIES = 3  # of a task whose worker died
BUILDS, MEASURED, LOGS, PAGE = "builds", "measured", "logs", "sweep.html"
_ANSWERS = 5.0  # seconds within which an address must


def run(sweep: Sweep, out: Path, options: SweepOptions) -> tuple[dict[str, Done], ReportFile | None]:
    """Build all into ``out/builds``, measure each model's artifacts alone on a node, and write ``out/sweep.html``.

    ``out`` must be on storage that all nodes share. What is done already is kept; the same call goes on with a sweep that was
    killed. Returns how every build ended, and every measuring that failed, by name, and what was measured. Raises
    MissingPackageError, InputError for an address where no Ray answers, OptionError for a build that no node is large enough for.
    """
    require("ray")
    out = real(out)  # workers have another current folder
    with _ray(options):
        cores = _cores_of_a_node()
        each = options.cores or cores
        memory = size_in_bytes(options.memory, "--memory") if options.memory else 0
        _check_fits(cores if any(wanted.alone for wanted in sweep.builds) else each, memory)
        log.info("sweep: %d builds, %d cores each; what they say stands in %s", len(sweep.builds), each, out / LOGS)
        tasks = {}
        for wanted in sweep.builds:
            log_file, taken = out / LOGS / f"{wanted.name}.log", cores if wanted.alone else each
            tasks[wanted.name] = _submit(build, taken, memory, wanted, out / BUILDS / wanted.name, log_file, memory or None)
        done = _all(tasks)
        measuring = {}
        for name, builds in sweep.sets.items():
            if artifacts := tuple(path for wanted in builds if (path := done[wanted.name].wrote) is not None):
                original = out / BUILDS / builds[0].name / "00-trim" if builds[0].trimmed else builds[0].original
                log_file = out / LOGS / f"{name}-measured.log"
                measuring[name] = _submit(measure, cores, 0, original, artifacts, sweep.bench, out / MEASURED / name, log_file)
        if measuring:
            log.info("sweep: measuring %s, each set alone on a node", ", ".join(measuring))
        measured = _all(measuring)
    reports = [end.wrote for end in measured.values() if end.wrote is not None]
    content = gather(reports) if reports else None
    if content:
        save(content, out / PAGE)
    return done | {f"measuring {title}": end for title, end in measured.items() if end.failed}, content


@contextmanager
def _ray(options: SweepOptions) -> Iterator[None]:
    """Connected to the cluster at an address, or to one of this machine that ends with this process."""
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no Ray cluster at {address} ({reason}); give --ray-address what ray start said, or leave it out"
        ) from error
    interrupt.install_handlers()  # Ray put its own in their place
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself tries for a minute. Raises OptionError and InputError."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise OptionError(f"--ray-address takes HOST:PORT, as ray start says it, not '{address}'")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"nothing answers at {address} ({error}); give --ray-address what ray start said, or leave it out"
        ) from error


def _cores_of_a_node() -> int:
    """Of the largest one: a task that needs all of them has it for itself."""
    import ray

    return max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])


def _check_fits(cores: int, memory: int) -> None:
    """Ray would wait for such a node for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cores and node.get("memory", 0) >= memory for node in nodes):
        largest = max(nodes, key=lambda node: (node.get("CPU", 0), node.get("memory", 0)))
        raise OptionError(
            f"no node has {cores} cores and {memory / 1e9:.1f} GB for a build; the largest has {largest.get('CPU', 0):.0f} and "
            f"{largest.get('memory', 0) / 1e9:.1f} GB: give less to --cores or --memory"
        )


def _submit(work: Callable[..., Done], cores: int, memory: int, *given: object) -> Any:
    """A task in a process of its own, run again where that dies."""
    import ray

    needs = {"num_cpus": cores, **({"memory": memory} if memory else {})}
    return ray.remote(max_calls=1, max_retries=RETRIES, **needs)(work).remote(*given)


def _all(tasks: dict[str, Any]) -> dict[str, Done]:
    """Wait for tasks, saying what each came to."""
    import ray

    names, begun, done = {task: name for name, task in tasks.items()}, time.monotonic(), dict[str, Done]()
    while len(done) < len(names):
        (task, *_), _ = ray.wait([task for task in names if names[task] not in done])
        name = names[task]
        try:
            done[name] = ray.get(task)
        except ray.exceptions.RayTaskError as error:  # of Ray's own work around ours, which returns what failed
            done[name] = Done(0.0, failed=one_line(f"{type(error.cause).__name__}: {error.cause}"))
        except ray.exceptions.RayError as error:
            done[name] = Done(0.0, failed=f"its worker died {RETRIES + 1} times ({type(error).__name__})")
        rest = (time.monotonic() - begun) * (len(names) - len(done)) / len(done)
        said = done[name].failed or _size(done[name])
        log.info("sweep: %s: %s (%d of %d, about %d min left)", name, said, len(done), len(names), round(rest / 60))
    return {name: done[name] for name in tasks}


def _size(end: Done) -> str:
    assert end.wrote is not None
    return f"{folder_bytes(end.wrote) / 1e6:.1f} MB in {end.seconds:.0f} s"


# Title of a column, its figure, its unit in that of the figure, and its form.
_COLUMNS = (
    ("MB", SIZE, 1e6, ".1f"), ("perplexity", "quality.perplexity", 1, ".2f"), ("KL", "quality.kl_mean", 1, ".4f"),
    ("tokens/s", DECODE, 1, ".1f"), ("peak MB", MEMORY, 1e6, ".0f"),
)  # fmt: skip


def table(content: ReportFile | None, done: dict[str, Done]) -> str:
    """A row for each build: bytes, loss, speed and memory, or why there is none."""
    measured = {report.artifact: report.figures for report in content.reports} if content else {}
    rows = [["build", *(title for title, *_ in _COLUMNS)]]
    for name in done:
        figures = measured.get(name, {})
        rows.append(
            [name, *(format(figures[key].median / unit, form) if key in figures else "" for _, key, unit, form in _COLUMNS)]
        )
    head, *lines = aligned(rows).splitlines()
    missing = ("" if name in measured else f"  {end.failed or 'not measured'}" for name, end in done.items())
    return "\n".join([head, *(line + why for line, why in zip(lines, missing, strict=True))])
