"""The bench stage: what the shipped files need and give, each sample from a process of its own, several artifacts in turn."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import environment, machine
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.process import measured
from edgepress.pipeline.bench.quality import quality, texts
from edgepress.pipeline.bench.speed import speed, speed_jobs
from edgepress.pipeline.bench.subject import Subject, subjects_of
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.files import files_below, folder_bytes, journal_of, sha256
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.report import files
from edgepress.pipeline.report.comparison import comparisons
from edgepress.pipeline.report.stats import Measurement

log = logging.getLogger("edgepress")
SCHEMA = 2


def bench(source: Artifact, out: Path, options: BenchOptions) -> dict[str, Any]:
    """Write report.json, report.md and report.html into ``out``; returns the medians of ``source`` for the manifest.

    Raises WorkerError when ``source`` is alone and a process that measures it dies; beside others that is a finding.
    """
    subjects = subjects_of(source, options)
    jobs, scored = speed_jobs(subjects, options), texts(subjects, options)
    here = environment(options.target, options.threads)
    journal = Journal(journal_of(out), machine=machine(options.target))
    if journal.resumed:
        log.info("bench: going on with %d finished measurements of an interrupted run", journal.resumed)
    for subject in subjects:
        subject.figures |= size(subject)
    speed(subjects, jobs, options, journal)
    _go_on(subjects)
    quality(subjects, scored, options, journal)
    tasks(subjects, options, journal)
    _go_on(subjects)
    reports = [s.plain() | {"environment": here, "run": journal.key(here["date"])[:16]} for s in subjects]
    content = {"schema": SCHEMA} | reports[0] | {"beside": reports[1:], "comparisons": comparisons(reports)}
    files.write(content, out)
    return {name: figure["median"] for name, figure in content["figures"].items()}


def _go_on(subjects: list[Subject]) -> None:
    """Raise WorkerError when no subject is left that could be measured."""
    if all(subject.failed for subject in subjects):
        what, why = next(iter(subjects[0].failed.items()))
        raise WorkerError(f"{subjects[0].path} could not be measured ({what}): {why}")


def size(subject: Subject) -> dict[str, Measurement]:
    """Bytes of the folder as it ships and of each file, and bits per weight of the model file."""
    found = {"size.total_bytes": Measurement("byte", [folder_bytes(subject.path)])}
    for file in files_below(subject.path):
        found[f"size.file_bytes.{file.name}"] = Measurement("byte", [file.stat().st_size])
    if parameters := subject.fact("parameters"):
        stored = sum(p.stat().st_size for p in subject.path.glob("model.onnx*"))
        found["size.bits_per_weight"] = Measurement("bit", [8 * stored / np.atleast_1d(parameters)[-1]])
    else:
        subject.missing["size.bits_per_weight"] = "the manifest does not tell the number of parameters; export again"
    return found


def tasks(subjects: list[Subject], options: BenchOptions, journal: Journal) -> None:
    """Figures ``tasks.TASK.METRIC`` of lm-evaluation-harness on the shipped files, with their standard errors."""
    if not options.tasks:
        return
    files = [str(file) for file in options.task_files]
    common = {"tasks": list(options.tasks), "files": files, "limit": options.task_limit}
    contents = [sha256(file) for file in options.task_files]
    for subject in progress(subjects, "tasks", "artifact"):
        if subject.failed:
            continue
        job = common | {"folder": str(subject.path), "threads": options.threads, "target": options.target}
        try:
            key = (subject.artifact.identity(), options.tasks, contents, options.task_limit, options.target)
            found = journal.once(partial(measured, "tasks", job), "tasks", *key)
        except WorkerError as error:
            subject.failed["tasks"] = str(error)
            log.warning("warning: the tasks could not be run on %s: %s", subject.label, error)
            continue
        for name, figure in found["figures"].items():
            subject.figures[f"tasks.{name}"] = Measurement("1", [figure["value"]], figure.get("standard_error"))
