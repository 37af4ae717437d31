"""How fast the artifacts of a model are on this machine, and what memory they take: measured on three, reckoned for the others.

A step of decoding reads every matrix once, and a matrix takes as long as one of its bits takes: what an artifact of mixed bits
takes lies between those of the same bits everywhere, by their shares of the weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from edgepress.exporters.stage import draft
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import environment, machine
from edgepress.pipeline.bench.jobs import SpeedJob, SpeedSample
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.options import BenchOptions, ExportOptions, QuantizeOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.budget import Costs, Fit
from edgepress.pipeline.quantize.mix import BASE, EIGHT, Form
from edgepress.pipeline.quantize.pack import quantize_checkpoint
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.plain import object_of
from edgepress.pipeline.text.windows import text_windows

log = logging.getLogger("edgepress")
FORMS = (Form(2, 64), BASE, EIGHT)  # of all blocks of an artifact that is measured; its head has 8 bits
HEAD_BITS = 8
ROUNDS = 3
PROMPT = 128


@dataclass(frozen=True)
class Cost:
    """What running an artifact takes: seconds a token, seconds to the first token of the prompt, bytes of memory at the peak.

    memory: None where the system does not report it.
    """

    decode_s: float
    ttft_s: float
    memory: float | None


@dataclass(frozen=True)
class Speeds:
    """costs: of the artifacts with the bits of ``FORMS`` everywhere, by bits. prompt: tokens before the first one."""

    costs: dict[str, Cost]
    prompt: int

    def of(self, costs: Costs, found: Fit) -> Cost:
        """What the artifact that ``fit`` found is expected to take."""
        weights = [item.weights for item in costs.items]
        shares = {
            form: sum(n for n, taken in zip(weights, found.forms, strict=True) if taken.bits == form.bits) / sum(weights)
            for form in FORMS
        }
        mixed = sum(share * _size(costs, form) for form, share in shares.items())
        more = found.size - mixed  # blocks of another length, a head of other bits

        def mean(figure: Callable[[Cost], float]) -> float:
            known = {form: figure(self.costs[str(form.bits)]) for form in FORMS}
            slope = max(0.0, known[EIGHT] - known[BASE]) / (_size(costs, EIGHT) - _size(costs, BASE))
            return sum(share * known[form] for form, share in shares.items()) + slope * more

        memory = None if any(cost.memory is None for cost in self.costs.values()) else mean(lambda cost: cost.memory or 0.0)
        return Cost(mean(lambda cost: cost.decode_s), mean(lambda cost: cost.ttft_s), memory)


def _size(costs: Costs, form: Form) -> int:
    """Bytes of the artifact with one form everywhere."""
    return sum(item.bytes[form] for item in costs.items) + costs.ends.bytes(HEAD_BITS, form.group_size) + costs.ends.rest


def speeds_of(source: Artifact, options: QuantizeOptions, text: Path, text_key: str, threads: int) -> Speeds:
    """As they were measured on this machine before, or now. Raises WorkerError where a measuring process dies."""
    parts = [source.identity(), machine("cpu"), threads, options.symmetric, FORMS, ROUNDS, version("edgepress")]
    kept = cache_folder() / "speeds" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
    with suppress(InputError, ValueError):
        return typed(Speeds, read_json(kept))
    run = environment("cpu", threads)
    busy = run.load_average is not None and run.load_average > run.cores
    if busy:
        log.warning("warning: other programs are busy, so speeds will look slower than they are; they are not kept for next time")
    speeds = _measure(source, options, text, text_key, threads)
    with suppress(OSError, OutputError):  # measured again next time
        if busy:
            return speeds
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, object_of(speeds))
    return speeds


def _measure(source: Artifact, options: QuantizeOptions, text: Path, text_key: str, threads: int) -> Speeds:
    room = Checkpoint(source.path, options.trust_remote_code).context
    usual = BenchOptions()
    prompt = min(PROMPT, max(1, room - usual.new_tokens - 8))
    ids = np.concatenate(text_windows(text, source.path, budget=prompt, length=prompt, key=text_key))[:prompt]
    samples: dict[Form, list[SpeedSample]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory(prefix="edgepress-plan-") as scratch:
        folders = {form: Path(scratch) / str(form.bits) for form in FORMS}
        for form in progress(FORMS, "artifacts to measure", "artifact"):
            _write(source, folders[form], dataclasses.replace(options, method="rtn", act_order=False, bits=form.bits,
                   group_size=form.group_size, max_size=None, head_bits=HEAD_BITS))  # fmt: skip
        for number in progress(range(ROUNDS), "speed", "round"):
            for form in FORMS if number % 2 == 0 else FORMS[::-1]:
                job = SpeedJob(str(folders[form]), tuple(ids.tolist()), (prompt,), usual.new_tokens, threads)
                samples[form].append(measured("speed", job, SpeedSample))
    return Speeds({str(form.bits): _cost(rows, prompt) for form, rows in samples.items()}, prompt)


def _write(source: Artifact, out: Path, options: QuantizeOptions) -> None:
    """An artifact to be measured and thrown away: not proven, for only what it takes is asked of it."""
    packed = out.with_name(f"{out.name}-packed")
    packed.mkdir()
    out.mkdir()
    level = log.level
    log.setLevel(logging.WARNING)  # what it says of blocks and exporters is for the stages that ship something
    try:
        quantize_checkpoint(source, packed, options, out)
        draft(Checkpoint(packed, options.trust_remote_code), out, ExportOptions(trust_remote_code=options.trust_remote_code))
    finally:
        log.setLevel(level)
    release_memory()


def _cost(samples: Sequence[SpeedSample], prompt: int) -> Cost:
    memory = [value for sample in samples if (value := sample.values["memory.peak_rss_bytes"]) is not None]
    return Cost(
        median(sum(sample.inter_token_ms) / len(sample.inter_token_ms) / 1000 for sample in samples),
        median(sample.prefill[str(prompt)] for sample in samples),
        median(memory) if memory else None,
    )
