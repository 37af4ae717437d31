"""The bench stage: what the shipped files need and give, each sample from a process of its own, several artifacts in turn."""

from __future__ import annotations

import logging
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline import report, targets
from edgepress.pipeline.artifact import Artifact, files_below, folder_bytes, journal_of, sha256
from edgepress.pipeline.comparison import comparisons, labels
from edgepress.pipeline.environment import environment, machine
from edgepress.pipeline.errors import InputError, OptionError, WorkerError
from edgepress.pipeline.measure import Journal, measured
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quality import check_references, quality, texts
from edgepress.pipeline.stats import Measurement
from edgepress.pipeline.table import require
from edgepress.pipeline.tokens import context_length, text_windows

log = logging.getLogger("edgepress")
SCHEMA = 2


@dataclass
class Subject:
    """One artifact under measurement. failed: which measurement -> why its process died."""

    artifact: Artifact
    label: str
    stages: tuple[Path, ...]
    figures: dict[str, Measurement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.artifact.path

    def fact(self, name: str) -> Any:
        """The last stage's word on something, or None."""
        return next((s.facts[name] for s in reversed(self.artifact.steps) if name in s.facts), None)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        steps = [
            {"stage": s.stage, "options": {k: v for k, v in s.options.items() if v is not None}, "facts": s.facts}
            for s in self.artifact.steps
        ]
        return {
            "artifact": self.label,
            "identity": self.artifact.identity(),
            "steps": steps,
            "figures": {name: figure.plain() for name, figure in self.figures.items()},
            "stages": self.rows,
            "missing": self.missing,
            "failed": self.failed,
        }


def bench(source: Artifact, out: Path, options: BenchOptions) -> dict[str, Any]:
    """Write report.json, report.md and report.html into ``out``; returns the medians of ``source`` for the manifest.

    Raises WorkerError when ``source`` is alone and a process that measures it dies; beside others that is a finding.
    """
    subjects = _subjects(source, options)
    jobs, scored = _jobs(subjects, options), texts(subjects, options)
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
    report.write(content, out)
    return {name: figure["median"] for name, figure in content["figures"].items()}


def _go_on(subjects: list[Subject]) -> None:
    """Raise WorkerError when no subject is left that could be measured."""
    if all(subject.failed for subject in subjects):
        what, why = next(iter(subjects[0].failed.items()))
        raise WorkerError(f"{subjects[0].path} could not be measured ({what}): {why}")


def _subjects(source: Artifact, options: BenchOptions) -> list[Subject]:
    """Everything named is there, whole, and can be read: checked before anything is measured."""
    targets.target(options.target)
    others = [Artifact.load(folder) for folder in options.beside]
    for other in others:
        if other.format != "onnx":
            raise InputError(f"bench takes onnx, and {other.path} is {other.format}; give the folder that export wrote")
        if damaged := other.damaged():
            raise InputError(f"{other.path / damaged[0]} was changed since {other.path} was written; build that folder again")
    check_references(options)
    artifacts = [source, *others]
    for artifact in artifacts:
        made_for = artifact.steps[-1].options.get("target", "cpu") if artifact.steps else "cpu"
        if options.target == "cuda" and made_for != "cuda":
            raise InputError(f"{artifact.path} was exported for the CPU; export it with --target cuda to measure it there")
    names = labels([a.path for a in artifacts])
    subjects = [Subject(a, name, stages_of(a) if options.reference else ()) for a, name in zip(artifacts, names, strict=True)]
    if options.stages:
        subjects[0].stages = options.stages
    if options.tasks:
        require("lm_eval")
        if absent := [file for file in options.task_files if not file.is_file()]:
            raise OptionError(f"no such file: {absent[0]}; --task-files takes .jsonl files, one for each of --tasks")
    if options.reference or any(s.stages for s in subjects):
        require("torch")
        require("transformers")
    return subjects


def stages_of(artifact: Artifact) -> tuple[Path, ...]:
    """The checkpoints behind an artifact that still lie beside it, first to last: their manifest is the beginning of its own."""
    found = []
    for folder in artifact.path.resolve().parent.iterdir():
        try:
            other = Artifact.load(folder)
        except InputError:
            continue
        if other.format in ("hf", "packed") and other.steps and other.steps == artifact.steps[: len(other.steps)]:
            found.append((len(other.steps), folder))
    return tuple(folder for _, folder in sorted(found))


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


def _jobs(subjects: list[Subject], options: BenchOptions) -> list[dict[str, Any]]:
    """What the speed process of each subject is told. Raises OptionError when nothing fits the shortest context."""
    room = min(context_length(s.path) for s in subjects)
    lengths = options.fitting(room)
    jobs = []
    for subject in subjects:
        for length in set(options.prompt_lengths) - set(lengths):
            subject.missing[f"speed.prefill_tokens_per_s.{length}"] = f"the model's context is {room} tokens"
            subject.missing[f"speed.ttft_ms.{length}"] = f"the model's context is {room} tokens"
        # Fixed ids from the text, never sampled from the model under test.
        ids = np.concatenate(text_windows(options.text, subject.path, budget=max(lengths), length=room))[: max(lengths)].tolist()
        common = {"folder": str(subject.path), "threads": options.threads, "target": options.target}
        jobs.append(common | {"ids": ids, "prompt_lengths": lengths, "new_tokens": options.new_tokens})
    return jobs


def speed(subjects: list[Subject], jobs: list[dict[str, Any]], options: BenchOptions, journal: Journal) -> None:
    """Rounds over all subjects, A B B A: every sample has a partner of each other subject from the same minute.

    A subject whose process dies is left out of the rounds that follow.
    """
    samples: list[list[dict[str, Any]]] = [[] for _ in subjects]
    for number in progress(range(options.repeats), "speed", "round"):
        alive = [i for i, s in enumerate(subjects) if "speed" not in s.failed]
        depends = [[subjects[i].artifact.identity(), {k: v for k, v in jobs[i].items() if k != "folder"}] for i in alive]
        key = journal.key("round", number, depends)
        found = journal.get(key)
        if found is None:
            found = _round(subjects, jobs, alive if number % 2 == 0 else alive[::-1], options)
            if all(str(i) in found for i in alive):
                journal.put(key, found)
        for i in alive:
            if str(i) in found:
                samples[i].append(found[str(i)] | {"bandwidth": found["bandwidth"]})
    for subject, taken in zip(subjects, samples, strict=True):
        if taken:
            _speed_figures(subject, taken, options)


def _round(subjects: list[Subject], jobs: list[dict[str, Any]], order: list[int], options: BenchOptions) -> dict[str, Any]:
    """One sample of each subject in ``order``, and of the memory's bandwidth."""
    found: dict[str, Any] = {"bandwidth": None}
    if options.target == "cpu":
        with suppress(WorkerError):  # a small machine has no room for it: a figure less
            found["bandwidth"] = measured("bandwidth", {"threads": options.threads})["bytes_per_s"]
    for i in order:
        try:
            cold = measured("cold", {k: jobs[i][k] for k in ("folder", "threads", "target")})
            found[str(i)] = measured("speed", jobs[i]) | {"cold": cold}
        except WorkerError as error:
            subjects[i].failed["speed"] = str(error)
            log.warning("warning: the speed of %s could not be measured: %s", subjects[i].label, error)
    return found


def _speed_figures(subject: Subject, samples: list[dict[str, Any]], options: BenchOptions) -> None:
    found, missing = subject.figures, subject.missing
    cold = [s["cold"]["load_s"] for s in samples if "load_s" in s["cold"]]
    if cold:
        found["load.cold_s"] = Measurement("second", cold)
    else:
        missing["load.cold_s"] = samples[0]["cold"]["reason"]
    found["load.warm_s"] = Measurement("second", [s["load_s"] for s in samples])
    for key, name in (("peak_rss_bytes", "peak_rss_bytes"), ("peak_pss_bytes", "peak_pss_bytes"), ("gpu_bytes", "gpu_bytes")):
        if values := [s[key] for s in samples if key in s]:
            found[f"memory.{name}"] = Measurement("byte", values)
        elif key == "gpu_bytes" and options.target == "cpu":
            missing["memory.gpu_bytes"] = "measured on the CPU"
        else:
            missing[f"memory.{name}"] = f"{platform.system()} does not tell" + (" (PSS is Linux only)" if "pss" in key else "")
    for length in samples[0]["prefill"]:
        seconds = [s["prefill"][length] for s in samples]
        found[f"speed.ttft_ms.{length}"] = Measurement("millisecond", [1000 * t for t in seconds])
        found[f"speed.prefill_tokens_per_s.{length}"] = Measurement("token/second", [int(length) / t for t in seconds])
    rates = [1000 * len(s["inter_token_ms"]) / sum(s["inter_token_ms"]) for s in samples]
    found["speed.decode_tokens_per_s"] = Measurement("token/second", rates)
    found["speed.inter_token_ms"] = Measurement("millisecond", [t for s in samples for t in s["inter_token_ms"]])
    read = subject.fact("weight_bytes_per_token")
    if options.target != "cpu":
        missing["speed.bandwidth_fraction"] = "the bandwidth of a GPU's memory is not measured"
    elif None in [s["bandwidth"] for s in samples]:
        missing["speed.bandwidth_fraction"] = (
            "the process that measures the memory's bandwidth died, most likely for want of memory"
        )
    elif read is None:
        missing["speed.bandwidth_fraction"] = "the manifest does not tell the bytes read per token; export again"
    else:
        widths = [s["bandwidth"] for s in samples]
        found["speed.memory_bandwidth"] = Measurement("byte/second", widths)
        found["speed.bytes_per_token"] = Measurement("byte", [read])
        fractions = [read * rate / width for rate, width in zip(rates, widths, strict=True)]
        found["speed.bandwidth_fraction"] = Measurement("1", fractions)


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
