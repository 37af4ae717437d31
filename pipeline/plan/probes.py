"""Artifacts that are made only to be measured, and what they take: on this machine, or on one that does nothing but run artifacts.

A folder of probes has one artifact in each of its folders, and says in probes.json how they are measured. `edgepress machine`
measures them where the folder was copied to, with neither torch nor the model at hand, and writes one file, which comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from edgepress.pipeline.bench.environment import environment, machine
from edgepress.pipeline.bench.jobs import ColdJob, ColdSample, SpeedJob, SpeedSample
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.progress import progress
from edgepress.pipeline.registry import require
from edgepress.pipeline.report.forecast import Usage
from edgepress.pipeline.report.model import Machine

log = logging.getLogger("edgepress")
DESCRIPTION = "probes.json"
SCHEMA = 1  # of both files
ROUNDS = 3


@dataclass(frozen=True)
class Probes:
    """What a folder of probes holds.

    model: its name. made_of: hash of the model and of how the probes were made. ids: the prompt. new_tokens: decoded after it.
    names: of the folders.
    """

    model: str
    made_of: str
    ids: tuple[int, ...]
    new_tokens: int
    names: tuple[str, ...]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not (self.names and self.ids and self.new_tokens > 0) or any(Path(name).name != name for name in self.names):
            raise ValueError("it describes no probes in its folder")


@dataclass(frozen=True)
class Measured:
    """What probes took. model, made_of: of ``Probes``. prompt: tokens before the first one. usages: by name of the probe."""

    model: str
    made_of: str
    prompt: int
    usages: dict[str, Usage]
    machine: Machine
    threads: int
    schema: int = SCHEMA

    @property
    def where(self) -> str:
        """``AMD Ryzen 7 7840U, 16 cores``."""
        return f"{self.machine.cpu.model}, {self.machine.cores} cores" + (f", {self.threads} threads" if self.threads else "")


def measure(folder: Path, probes: Probes, threads: int) -> dict[str, Usage]:
    """What each probe takes here, by name: the median of ``ROUNDS`` in turn. Raises WorkerError where a measuring process dies."""
    require("onnxruntime")
    samples: dict[str, list[SpeedSample]] = {name: [] for name in probes.names}
    for number in progress(range(ROUNDS), "speed", "round"):
        for name in probes.names if number % 2 == 0 else reversed(probes.names):
            # As bench does: what was just written lies in memory in larger pieces than what is read, and counts for more.
            measured("cold", ColdJob(str(folder / name), threads), ColdSample)
            job = SpeedJob(str(folder / name), probes.ids, (len(probes.ids),), probes.new_tokens, threads)
            samples[name].append(measured("speed", job, SpeedSample))
    return {name: _usage(rows, len(probes.ids)) for name, rows in samples.items()}


def busy() -> bool:
    """Whether other programs kept the processor busy in the last minute."""
    run = environment("cpu", 0)
    return run.load_average is not None and run.load_average > run.cores


def described(folder: Path) -> Probes:
    """What a folder of probes holds. Raises InputError for a folder of another kind."""
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} is no folder of probes; edgepress plan SRC --probes DIR writes one where the model is")
    probes = _read(Probes, folder / DESCRIPTION)
    if missing := [name for name in probes.names if not (folder / name / "model.onnx").is_file()]:
        raise InputError(f"{folder / missing[0]} is missing or incomplete; copy the complete folder")
    return probes


def measured_here(folder: Path, probes: Probes, threads: int) -> Measured:
    """What they take on this machine."""
    if busy():
        log.warning(
            "warning: other programs are busy, so speeds will look slower than they are; measure again when nothing else runs"
        )
    usages = measure(folder, probes, threads)
    return Measured(probes.model, probes.made_of, len(probes.ids), usages, machine("cpu"), threads)


def measured_elsewhere(file: Path, made_of: str, names: Collection[str]) -> Measured:
    """What a file of `edgepress machine` says of the probes ``made_of`` this, of these names. Raises InputError for others."""
    found = _read(Measured, file)
    if found.made_of != made_of:
        raise InputError(
            f"{file} is of other probes (of {found.model}): another model, other options or another version of edgepress; make "
            "them anew with edgepress plan SRC --probes DIR"
        )
    seconds = [value for usage in found.usages.values() for value in (usage.decode_s, usage.ttft_s)]
    if found.usages.keys() != set(names) or min(seconds) <= 0:
        raise InputError(f"{file} was changed since it was written; run edgepress machine again")
    return found


Document = TypeVar("Document", Probes, Measured)
WRITTEN_BY = {Probes: "description that edgepress plan --probes", Measured: "file that edgepress machine"}


def _read(kind: type[Document], file: Path) -> Document:
    content = read_json(file)
    if (schema := content.get("schema")) != SCHEMA:
        said = f"has schema {schema}, and this edgepress reads {SCHEMA}" if schema else f"is no {WRITTEN_BY[kind]} wrote"
        raise InputError(f"{file} {said}; use the same version on both machines")
    try:
        return typed(kind, content, str(file))
    except ValueError as error:
        raise InputError(f"{error}; run {WRITTEN_BY[kind].partition(' that ')[2]} again") from None


def _usage(samples: Sequence[SpeedSample], prompt: int) -> Usage:
    memory = [value for sample in samples if (value := sample.values["memory.peak_rss_bytes"]) is not None]
    return Usage(
        median(sum(sample.inter_token_ms) / len(sample.inter_token_ms) / 1000 for sample in samples),
        median(sample.prefill[str(prompt)] for sample in samples),
        median(memory) if memory else None,
    )
