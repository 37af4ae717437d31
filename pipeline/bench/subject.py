"""What is measured: one artifact, and the results of its measurement."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.jobs import TaskNames, TaskNamesJob
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import MANIFEST, read_json, real
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.registry import require
from edgepress.pipeline.report.comparison import labels
from edgepress.pipeline.report.forecast import Forecast
from edgepress.pipeline.report.model import Answer, Environment, Figure, Original, Report, StageRow
from edgepress.pipeline.report.steps import Step
from edgepress.pipeline.runtime import targets

log = logging.getLogger("edgepress")


@dataclass
class Subject:
    """One artifact, or the original, under measurement.

    stages: the checkpoints behind it. failed: which measurement -> why its process died. original: what was measured of that.
    rounds: of speed, that it takes part in at most; None for all.
    """

    artifact: Artifact
    label: str
    steps: tuple[Step, ...]
    stages: tuple[Path, ...]
    figures: dict[str, Figure] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rows: tuple[StageRow, ...] = ()
    answers: tuple[Answer, ...] = ()
    text: str = ""
    forecast: Forecast | None = None
    original: Original | None = None
    rounds: int | None = None

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.artifact.path

    @property
    def parameters(self) -> int | None:
        """Of the model as exported; None where no stage recorded them."""
        recorded = self._fact("parameters")
        last = recorded[-1] if isinstance(recorded, list) else recorded  # prune records them before and after
        return last if isinstance(last, int) else None

    @property
    def accuracy_level(self) -> int | None:
        """Of its quantized matrices; None where it has none."""
        level = self._fact("accuracy_level")
        return level if isinstance(level, int) else None

    @property
    def int8_cache(self) -> bool:
        """Whether its keys and values are int8."""
        return self._fact("cache") == "int8"

    @property
    def half(self) -> bool:
        """Whether its activations have sixteen bits, which round more than the order of additions does."""
        return self._fact("activations") in ("float16", "int16")

    @property
    def wide(self) -> bool:
        """Whether its blocks have 8-bit weights: with float activations such a graph takes minutes where others take seconds."""
        bits = self._fact("bits")
        return isinstance(bits, dict) and "8" in bits

    @property
    def weight_bytes_per_token(self) -> int | None:
        """Bytes of weights that one decoding step reads; None where the export did not record them."""
        read = self._fact("weight_bytes_per_token")
        return read if isinstance(read, int) else None

    def _fact(self, name: str) -> object:
        return next((s.facts[name] for s in reversed(self.artifact.steps) if name in s.facts), None)

    def report(self, environment: Environment, run: str) -> Report:
        """What was measured of it."""
        return Report(
            artifact=self.label,
            identity=self.artifact.identity(),
            steps=self.steps,
            figures=dict(self.figures),
            stages=self.rows,
            answers=self.answers,
            missing=self.missing,
            failed=self.failed,
            environment=environment,
            run=run,
            forecast=self.forecast,
            original=self.original,
            text=self.text,
        )


@dataclass(frozen=True)
class _Planned:
    """What a report shows of plan.json."""

    forecast: Forecast


def _forecast(plan: Path) -> Forecast:
    """Raises InputError for a file that is none."""
    try:
        return typed(_Planned, read_json(plan)).forecast
    except ValueError as error:
        raise InputError(f"{plan} is no plan of a build ({error}); leave --plans out") from error


def subjects_of(source: Artifact, options: BenchOptions) -> list[Subject]:
    """Everything named is there, whole, and can be read: checked before anything is measured."""
    _check_machine(options)
    others = [Artifact.load(folder) for folder in options.compare_with]
    for other in others:
        if other.format != "onnx":
            raise InputError(f"bench takes onnx, and {other.path} is {other.format}; give the folder that export wrote")
        if damaged := other.damaged():
            raise InputError(f"{other.path / damaged[0]} was changed since {other.path} was written; build that folder again")
    _check_references(options)
    artifacts = [source, *others]
    for artifact in artifacts:
        made_for = artifact.steps[-1].options.get("target", "cpu") if artifact.steps else "cpu"
        if options.target == "cuda" and made_for != "cuda":
            raise InputError(f"{artifact.path} was exported for {made_for}; export it with --target cuda to measure it there")
    names = labels([a.path for a in artifacts])
    subjects = [
        Subject(artifact, name, report_steps(artifact), stages_of(artifact) if options.reference else ())
        for artifact, name in zip(artifacts, names, strict=True)
    ]
    if options.stages:
        subjects[0].stages = options.stages
    for subject in subjects:
        subject.forecast = next((_forecast(plan) for plan in options.plans if real(plan).parent == real(subject.path).parent), None)
    if options.reference or any(s.stages for s in subjects):
        require("torch")
        require("transformers")
    return subjects


def foresee(source: Path, options: BenchOptions, removed: int = 0) -> None:
    """Refuse what this machine or lm-evaluation-harness does not have.

    Raises MissingPackageError, InputError, OptionError and WorkerError.
    """
    _check_machine(options)
    look_up_tasks(options)


def _check_machine(options: BenchOptions) -> None:
    """What can be told at once."""
    targets.target(options.target)
    targets.check_threads(options.threads)
    if options.tasks:
        require("lm_eval")
        if absent := [file for file in options.task_files if not file.is_file()]:
            raise OptionError(f"no such file: {absent[0]}; --task-files takes .jsonl files, one for each of --tasks")


def look_up_tasks(options: BenchOptions) -> None:
    """By a process of its own: the harness takes seconds to import, and more to read its index."""
    if options.tasks:
        _look_up(TaskNamesJob(options.tasks, bool(options.task_files)))


@cache  # a build has looked before its first stage
def _look_up(job: TaskNamesJob) -> TaskNames:
    log.info("bench: looking up in lm-evaluation-harness: %s", ", ".join(job.tasks))
    return measured("task_names", job, TaskNames)


def _check_references(options: BenchOptions) -> None:
    """Every checkpoint named is there and can be read."""
    if options.stages and options.reference is None:
        raise OptionError("--stages are measured against the original; give it with --reference")
    for folder in (options.reference, *options.stages):
        if folder is not None:
            check_checkpoint(Artifact.load(folder).path, options.trust_remote_code, quantized=True)


def report_steps(artifact: Artifact) -> tuple[Step, ...]:
    """The stages behind an artifact as its report has them. Raises InputError for a manifest whose facts are damaged."""
    try:
        return tuple(
            Step(step.stage, {key: value for key, value in step.options.items() if value is not None}, step.facts)
            for step in artifact.steps
        )
    except ValueError as error:
        raise InputError(f"{artifact.path / MANIFEST} is damaged ({error}); build that folder again") from error


def stages_of(artifact: Artifact) -> tuple[Path, ...]:
    """The checkpoints behind an artifact in the folders next to it, first to last: their steps are the beginning of its steps."""
    stages = []
    for folder in real(artifact.path).parent.iterdir():
        try:
            other = Artifact.load(folder)
        except InputError:
            continue
        if other.format in ("hf", "packed") and other.steps and other.steps == artifact.steps[: len(other.steps)]:
            stages.append((len(other.steps), folder))
    return tuple(folder for _, folder in sorted(stages))
