"""Speed and memory: rounds over all artifacts, each sample from a process of its own (worker.py)."""

from __future__ import annotations

import logging
import platform
from contextlib import suppress
from dataclasses import replace

import numpy as np
from edgepress.pipeline.bench.jobs import Bandwidth, BandwidthJob, ColdJob, ColdSample, Round, Sample, SpeedJob, SpeedSample
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.bench.original import keep_fastest
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.report.model import Figure
from edgepress.pipeline.text.windows import context_length, text_windows

log = logging.getLogger("edgepress")
_UNITS = {"bytes": "byte", "ms": "millisecond", "s": "second"}  # by the ending of a figure's name


def speed_jobs(subjects: list[Subject], options: BenchOptions) -> list[SpeedJob]:
    """The speed job of each subject. Raises OptionError when no prompt length fits the shortest context."""
    room = min(context_length(s.path) for s in subjects)
    lengths = tuple(options.lengths_within(room))
    jobs = []
    for subject in subjects:
        for length in set(options.prompt_lengths) - set(lengths):
            subject.missing[f"speed.prefill_tokens_per_s.{length}"] = f"the model's context is {room} tokens"
            subject.missing[f"speed.ttft_ms.{length}"] = f"the model's context is {room} tokens"
        # Fixed ids from the text, never sampled from the model under test.
        ids = np.concatenate(text_windows(options.text, subject.path, budget=max(lengths), length=room, key=options.text_key))[
            : max(lengths)
        ].tolist()
        job = SpeedJob(str(subject.path), tuple(ids), lengths, options.new_tokens, options.threads, options.target)
        jobs.append(job)
    return jobs


def speed(subjects: list[Subject], jobs: list[SpeedJob], options: BenchOptions, journal: Journal) -> None:
    """Rounds over all subjects, A B B A: every sample has a partner of each other subject from the same minute.

    A subject whose process dies takes no part in the rounds that follow; the original takes part in the first few alone.
    """
    rounds: list[Round] = []
    for number in progress(range(options.repeats), "speed", "round"):
        alive = [i for i, s in enumerate(subjects) if "speed" not in s.failed and number < (s.rounds or options.repeats)]
        depends = [(subjects[i].artifact.identity(), replace(jobs[i], folder="")) for i in alive]
        key = journal.key("round", number, depends)
        known = journal.get(Round, key)
        if known is None:
            known = _round(subjects, jobs, alive if number % 2 == 0 else alive[::-1], options)
            if all(str(i) in known.samples for i in alive):
                journal.put(key, known)
        rounds.append(known)
        if number == 0:
            keep_fastest(subjects, jobs, known)
    for i, subject in enumerate(subjects):
        taken = [(one.samples[str(i)], one.bandwidth) for one in rounds if str(i) in one.samples]
        if taken:
            _speed_figures(subject, [sample.speed for sample, _ in taken], options)
            _cold_figure(subject, [sample.cold for sample, _ in taken])
            _bandwidth_figures(subject, [bandwidth for _, bandwidth in taken], options)


def _round(subjects: list[Subject], jobs: list[SpeedJob], order: list[int], options: BenchOptions) -> Round:
    """One sample of each subject in ``order``, and of the memory's bandwidth."""
    bandwidth = None
    if options.target != "cuda":
        with suppress(WorkerError):  # a small machine may not have the memory for it: one figure is missing then
            bandwidth = measured("bandwidth", BandwidthJob(options.threads), Bandwidth).bytes_per_s
    samples = {}
    for i in order:
        job = jobs[i]
        try:
            cold = ColdSample(reason="of artifacts alone")
            if job.dtype is None:
                cold = measured("cold", ColdJob(job.folder, job.threads, job.target), ColdSample)
            samples[str(i)] = Sample(measured("speed", job, SpeedSample), cold)
        except WorkerError as error:
            subjects[i].failed["speed"] = str(error)
            log.warning("warning: the speed of %s could not be measured: %s", subjects[i].label, error)
    return Round(bandwidth, samples)


def _speed_figures(subject: Subject, samples: list[SpeedSample], options: BenchOptions) -> None:
    figures, missing = subject.figures, subject.missing
    figures["load.warm_s"] = Figure.of("second", [s.load_s for s in samples])
    for name in samples[0].values:
        if known := [value for sample in samples if (value := sample.values[name]) is not None]:
            figures[name] = Figure.of(_UNITS[name.rpartition("_")[2]], known)
        elif name == "memory.gpu_bytes":
            missing[name] = "measured on the CPU" if options.target != "cuda" else "the driver does not report it"
        else:
            missing[name] = f"{platform.system()} does not report it" + (" (PSS is Linux only)" if "pss" in name else "")
    for length in samples[0].prefill:
        seconds = [s.prefill[length] for s in samples]
        figures[f"speed.ttft_ms.{length}"] = Figure.of("millisecond", [1000 * t for t in seconds])
        figures[f"speed.prefill_tokens_per_s.{length}"] = Figure.of("token/second", [int(length) / t for t in seconds])
    rates = [1000 * len(s.inter_token_ms) / sum(s.inter_token_ms) for s in samples]
    figures["speed.decode_tokens_per_s"] = Figure.of("token/second", rates)
    figures["speed.inter_token_ms"] = Figure.of("millisecond", [t for s in samples for t in s.inter_token_ms])


def _cold_figure(subject: Subject, samples: list[ColdSample]) -> None:
    if seconds := [s.load_s for s in samples if s.load_s is not None]:
        subject.figures["load.cold_s"] = Figure.of("second", seconds)
    else:
        subject.missing["load.cold_s"] = samples[0].reason or "not measured"


def _bandwidth_figures(subject: Subject, bandwidths: list[float | None], options: BenchOptions) -> None:
    """By round: bytes read per token x decode rate / bandwidth."""
    figures, missing, read = subject.figures, subject.missing, subject.weight_bytes_per_token
    widths = [width for width in bandwidths if width is not None]
    if options.target == "cuda":
        missing["speed.bandwidth_fraction"] = "the bandwidth of a GPU's memory is not measured"
    elif len(widths) < len(bandwidths):
        missing["speed.bandwidth_fraction"] = "the process that measures memory bandwidth died, most likely out of memory"
    elif read is None:
        missing["speed.bandwidth_fraction"] = "the manifest does not record the bytes read per token; export again"
    else:
        rates = figures["speed.decode_tokens_per_s"].values
        figures["speed.memory_bandwidth"] = Figure.of("byte/second", widths)
        figures["speed.bytes_per_token"] = Figure.of("byte", [read])
        figures["speed.bandwidth_fraction"] = Figure.of("1", [read * r / w for r, w in zip(rates, widths, strict=True)])
