"""What is measured of the original as people run it: its jobs, in the types that it may run in, and what its report says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.jobs import Round, SpeedJob
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.checkpoint.admission import settings_of
from edgepress.pipeline.checkpoint.shards import rows_of
from edgepress.pipeline.machine import available_memory
from edgepress.pipeline.options import ORIGINAL_ROUNDS, BenchOptions
from edgepress.pipeline.report.forecast import DECODE
from edgepress.pipeline.report.model import Original

_TYPES = {"BF16": "bfloat16", "F16": "float16"}  # as safetensors and torch call them
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LIBRARIES = 0.5e9  # bytes: torch and transformers in memory


def original_jobs(like: SpeedJob, options: BenchOptions) -> tuple[list[SpeedJob], str]:
    """The jobs of the original in float32 and in the type of its weights, else as ``like``; and where there are none, why."""
    folder = options.reference
    if folder is None:
        return [], "no original was given (--reference)"
    if not options.original_speed:
        return [], "left out (--no-original-speed)"
    if options.target == "cuda":
        return [], "the original is measured on the CPU alone"
    if Artifact.load(folder).format != "hf" or settings_of(folder):
        return [], "the original is quantized: plain transformers does not run it"
    sizes: Counter[str] = Counter()
    for row in rows_of(folder).values():
        sizes[row.dtype] += math.prod(row.shape)
    stored = _TYPES.get(max(sizes, key=lambda name: sizes[name]), "float32")
    needed = {dtype: _BYTES[dtype] * sizes.total() + _LIBRARIES for dtype in sorted({"float32", stored})}
    free = available_memory() or math.inf
    if not (fitting := [dtype for dtype, size in needed.items() if size <= free / 2]):
        least = min(needed.values())
        return [], f"the original would take about {least / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free: more than half"
    trusted = options.trust_remote_code
    return [replace(like, folder=str(folder), dtype=dtype, trust_remote_code=trusted) for dtype in fitting], ""


def subject_of(job: SpeedJob) -> Subject:
    """The original in the type of a job, in a few rounds."""
    return Subject(Artifact.load(Path(job.folder)), f"the original in {job.dtype}", (), (), rounds=ORIGINAL_ROUNDS)


def keep_fastest(subjects: Sequence[Subject], jobs: Sequence[SpeedJob], first: Round) -> None:
    """After the ``first`` round the original goes on in the type in which it decodes faster."""
    took = {int(i): sum(sample.speed.inter_token_ms) for i, sample in first.samples.items() if jobs[int(i)].dtype}
    for i in sorted(took, key=lambda i: took[i])[1:]:
        subjects[i].rounds = 1


def result(subjects: Sequence[Subject], jobs: Sequence[SpeedJob], reason: str) -> Original | str:
    """What was measured of the original in its faster type, or why nothing was. reason: of ``original_jobs``."""
    known = [(s.figures[DECODE], s, job) for s, job in zip(subjects, jobs, strict=True) if DECODE in s.figures]
    if not known:
        return reason or f"plain transformers did not run the original: {subjects[-1].failed['speed']}"
    _, subject, job = max(known, key=lambda row: (len(row[0].values), row[0].median))
    # of the time between tokens the rate is enough
    return Original(job.dtype or "", {name: figure for name, figure in subject.figures.items() if name != "speed.inter_token_ms"})
