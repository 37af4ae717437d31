"""Speed and memory: rounds over all artifacts, each sample from a process of its own."""

from __future__ import annotations

import logging
import platform
from contextlib import suppress
from typing import Any

import numpy as np
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.process import measured
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.report.stats import Measurement
from edgepress.pipeline.text.windows import context_length, text_windows

log = logging.getLogger("edgepress")


def speed_jobs(subjects: list[Subject], options: BenchOptions) -> list[dict[str, Any]]:
    """What the speed process of each subject is told. Raises OptionError when nothing fits the shortest context."""
    room = min(context_length(s.path) for s in subjects)
    lengths = options.lengths_within(room)
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
