"""The bench stage: what the shipped files need and give, each sample from a process of its own, artifacts in interleaved rounds."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import environment, machine
from edgepress.pipeline.bench.jobs import TaskFigures, TasksJob
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.bench.original import original_jobs, result, subject_of
from edgepress.pipeline.bench.quality import quality, texts
from edgepress.pipeline.bench.speed import speed, speed_jobs
from edgepress.pipeline.bench.subject import Subject, look_up_tasks, subjects_of
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.files import JsonObject, files_below, folder_bytes, graph_files, journal_of, sha256
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.report import files
from edgepress.pipeline.report.comparison import comparisons
from edgepress.pipeline.report.model import Figure, ReportFile

log = logging.getLogger("edgepress")


def bench(source: Artifact, out: Path, options: BenchOptions) -> JsonObject:
    """Write report.json, report.md and report.html into ``out``; returns the medians of ``source`` for the manifest.

    Raises WorkerError when ``source`` is alone and a process that measures it dies; among others that is a finding.
    """
    subjects = subjects_of(source, options)
    jobs, scored = speed_jobs(subjects, options), texts(subjects, options)
    beside, reason = original_jobs(jobs[0], options)
    originals = [subject_of(job) for job in beside]
    look_up_tasks(options)
    here = environment(options.target, options.threads)
    journal = Journal(journal_of(out), machine=machine(options.target))
    if journal.resumed:
        log.info("bench: resuming an interrupted run with %d finished measurements", journal.resumed)
    for subject in subjects:
        subject.text = options.text.name
        subject.figures |= size(subject)
    speed([*subjects, *originals], [*jobs, *beside], options, journal)
    _check_any_left(subjects)
    original = result(originals, beside, reason)
    for subject in subjects:
        if isinstance(original, str):
            subject.missing["original"] = original
        else:
            subject.original = original
    quality(subjects, scored, options, journal)
    tasks(subjects, options, journal)
    _check_any_left(subjects)
    run = journal.key(here.date)[:16]
    reports = tuple(subject.report(here, run) for subject in subjects)
    files.write(ReportFile(reports, comparisons(reports)), out)
    return {name: figure.median for name, figure in reports[0].figures.items()}


def _check_any_left(subjects: list[Subject]) -> None:
    """Raise WorkerError when no subject is left that could be measured."""
    if all(subject.failed for subject in subjects):
        what, why = next(iter(subjects[0].failed.items()))
        raise WorkerError(f"{subjects[0].path} could not be measured ({what}): {why}")


def size(subject: Subject) -> dict[str, Figure]:
    """Bytes of the folder as it ships and of each file, and bits per weight of the model file."""
    figures = {"size.total_bytes": Figure.of("byte", [folder_bytes(subject.path)])}
    for file in files_below(subject.path):
        figures[f"size.file_bytes.{file.name}"] = Figure.of("byte", [file.stat().st_size])
    if parameters := subject.parameters:
        stored = sum(p.stat().st_size for p in graph_files(subject.path))
        figures["size.bits_per_weight"] = Figure.of("bit", [8 * stored / parameters])
    else:
        subject.missing["size.bits_per_weight"] = "the manifest does not record the number of parameters; export again"
    return figures


def tasks(subjects: list[Subject], options: BenchOptions, journal: Journal) -> None:
    """Figures ``tasks.TASK.METRIC`` of lm-evaluation-harness on the shipped files, with their standard errors."""
    if not options.tasks:
        return
    documents = tuple(str(file) for file in options.task_files)
    contents = [sha256(file) for file in options.task_files]
    for subject in progress(subjects, "tasks", "artifact"):
        if subject.failed:
            continue
        folder = str(subject.path)
        job = TasksJob(folder, options.tasks, documents, options.task_limit, options.threads, options.target)
        try:
            key = (subject.artifact.identity(), options.tasks, contents, options.task_limit, options.target)
            answer = journal.once(TaskFigures, partial(measured, "tasks", job, TaskFigures), "tasks", *key)
        except WorkerError as error:
            subject.failed["tasks"] = str(error)
            log.warning("warning: the tasks could not be run on %s: %s", subject.label, error)
            continue
        for name, figure in answer.figures.items():
            subject.figures[f"tasks.{name}"] = Figure.of("1", [figure.value], figure.standard_error)
