"""What is measured: one artifact, and what was found of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.quality import check_references
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.registry import require
from edgepress.pipeline.report.comparison import labels
from edgepress.pipeline.report.stats import Measurement
from edgepress.pipeline.runtime import targets


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


def subjects_of(source: Artifact, options: BenchOptions) -> list[Subject]:
    """Everything named is there, whole, and can be read: checked before anything is measured."""
    targets.target(options.target)
    others = [Artifact.load(folder) for folder in options.compare_with]
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
