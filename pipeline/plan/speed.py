"""How fast the artifacts of a model are on a machine, and what memory they take: measured on five, reckoned for the others.

A step of decoding reads every matrix once, and a matrix takes as long as one of its bits takes: what an artifact of mixed bits
takes lies between those of the same bits everywhere, by their shares of the weights.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from edgepress.exporters.stage import draft
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import machine
from edgepress.pipeline.bench.worker import WARM_UP_TOKENS
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import FEW_BITS
from edgepress.pipeline.checkpoint.planes import operator_bits
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError, OptionError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import atomic_folder, check_disk, folder_bytes, read_json, real, write_json
from edgepress.pipeline.lock import writing
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.methods import BITS
from edgepress.pipeline.options import BenchOptions, ExportOptions, PlanOptions, QuantizeOptions
from edgepress.pipeline.plan.probes import DESCRIPTION, ROUNDS, Probes, measure, measured_elsewhere
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.budget import Costs, Fit
from edgepress.pipeline.quantize.mix import BASE, EIGHT, Form, Item
from edgepress.pipeline.quantize.pack import quantize_checkpoint
from edgepress.pipeline.registry import require, version
from edgepress.pipeline.report.forecast import Usage
from edgepress.pipeline.report.plain import object_of
from edgepress.pipeline.stages import check_outside
from edgepress.pipeline.text.windows import text_windows

log = logging.getLogger("edgepress")
SIX = Form(6, 64)
MEASURED = (Form(2, 64), BASE, SIX, EIGHT)  # of all blocks of an artifact that is measured; its head has 8 bits
# Bits that are not measured, and those that take as much but for what is in memory while planes become bytes of the operator.
LIKE = {3: BASE.bits, 5: SIX.bits}
HEAD_BITS = 8
# One more has BASE and a head of few bits, which moves as many bytes as all blocks where the vocabulary is large.
OF_HEAD = "head"
PROMPT, SHORTEST = 128, 8  # tokens


@dataclass(frozen=True)
class Speeds:
    """usages: of the artifacts with the bits of ``MEASURED`` everywhere, by bits, and of ``OF_HEAD``.

    prompt: tokens before the first one. lasting: whether nothing disturbed the measurement. machine: on which it was made, "" for
    this one.
    """

    usages: dict[str, Usage]
    prompt: int
    lasting: bool = True
    machine: str = ""

    def of(self, costs: Costs, found: Fit) -> Usage:
        """What the artifact that ``fit`` found is expected to take."""
        weights = [item.weights for item in costs.items]
        by_bits = dict.fromkeys(BITS, 0.0)
        for count, form in zip(weights, found.forms, strict=True):
            by_bits[form.bits] += count / sum(weights)
        shares = {form: sum(by_bits[n] for n in BITS if LIKE.get(n, n) == form.bits) for form in MEASURED}
        blocks = sum(_bytes_read(item, form) for item, form in zip(costs.items, found.forms, strict=True))

        def mean(figure: Callable[[Usage], float]) -> float:
            """A figure, how it grows with the bytes of blocks beyond those of the shares, and what a head of few bits does."""
            known = {form: figure(self.usages[str(form.bits)]) for form in MEASURED}
            size = {form: sum(_bytes_read(item, form) for item in costs.items) for form in MEASURED}
            more = blocks - sum(share * size[form] for form, share in shares.items())
            slope = max(0.0, known[EIGHT] - known[BASE]) / (size[EIGHT] - size[BASE])
            few = (HEAD_BITS - found.head.mean_bits(costs.ends.vocabulary)) / (HEAD_BITS - FEW_BITS)
            head = few * (figure(self.usages[OF_HEAD]) - known[BASE])
            planes = by_bits[3] * (known[SIX] - known[EIGHT]) * operator_bits(3) / operator_bits(SIX.bits)
            return sum(share * known[form] for form, share in shares.items()) + slope * more + planes + head

        memory = None if any(c.memory is None for c in self.usages.values()) else mean(lambda c: c.memory or 0.0)
        return Usage(mean(lambda c: c.decode_s), mean(lambda c: c.ttft_s), memory)


def _bytes_read(item: Item, form: Form) -> int:
    """By the operator, which reads more than the file has where it has other bits."""
    return item.bytes[form] + item.weights * (operator_bits(form.bits) - form.bits) // 8


def speeds_of(source: Artifact, options: PlanOptions, export: ExportOptions, disturbed: bool = False) -> Speeds:
    """As they were measured on ``options.machine``, or on this one before, or now.

    disturbed: by other programs, so that what is measured is not kept. Raises WorkerError where a measuring process dies,
    InputError for a file of other probes.
    """
    made_of = _made_of(source, options, export)
    if options.machine is not None:
        found = measured_elsewhere(options.machine, made_of, [*(str(form.bits) for form in MEASURED), OF_HEAD])
        here = machine("cpu")
        own = (found.machine.cpu, found.machine.cores) == (here.cpu, here.cores)
        return Speeds(found.usages, found.prompt, machine="" if own else found.where)
    parts = [made_of, machine("cpu"), options.threads, ROUNDS]
    kept = cache_folder() / "speeds" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
    with suppress(InputError, ValueError):
        return typed(Speeds, read_json(kept))
    if disturbed:
        log.warning(
            "warning: other programs are busy, so speeds will look slower than they are; they are not kept for the next time"
        )
        return replace(_measure(source, options, export), lasting=False)
    speeds = _measure(source, options, export)
    with suppress(OSError, OutputError):  # measured again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, object_of(speeds))
    return speeds


def _made_of(source: Artifact, options: PlanOptions, export: ExportOptions) -> str:
    """Hash of the model, and of all that decides what its probes are."""
    how = [export.exporter, export.accuracy_level, export.cache, options.symmetric, MEASURED, OF_HEAD, PROMPT]
    return hashlib.sha256(repr([source.identity(), *how, version("edgepress")]).encode()).hexdigest()


def _measure(source: Artifact, options: PlanOptions, export: ExportOptions) -> Speeds:
    require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="edgepress-plan-") as scratch:
        probes = write_probes(source, options, export, Path(scratch))
        return Speeds(measure(Path(scratch), probes, options.threads), len(probes.ids))


def probes_folder(source: Artifact, options: PlanOptions, out: Path) -> Path:
    """A new folder with what is measured of a model, to be measured elsewhere. Raises OutputError where there is one already."""
    check_outside(out, source.path)
    out = real(out)
    with writing(out):
        if out.exists():
            raise OutputError(f"{out} is there already; give --probes a new folder")
        with atomic_folder(out) as folder:
            write_probes(source, options, ExportOptions(), folder)
    return out


def write_probes(source: Artifact, options: PlanOptions, export: ExportOptions, folder: Path) -> Probes:
    """An artifact with each number of bits of ``MEASURED``, and ``OF_HEAD``, into a folder that is there.

    Raises OptionError for a model of too short a context.
    """
    room, usual = Checkpoint(source.path, options.trust_remote_code).context, BenchOptions()
    prompt, new = min(PROMPT, room // 2), min(usual.new_tokens, room // 2 - WARM_UP_TOKENS)
    if prompt < SHORTEST or new < 2:
        raise OptionError(f"a context of {room} tokens is too short to measure speed in; --no-speed plans without it")
    ids = np.concatenate(text_windows(options.text, source.path, budget=prompt, length=prompt, key=options.text_key))[:prompt]
    given = replace(options.quantize(), method="rtn", max_size=None)
    made = {str(form.bits): replace(given, bits=form.bits, group_size=form.group_size, head_bits=HEAD_BITS) for form in MEASURED}
    made[OF_HEAD] = replace(made[str(BASE.bits)], head_bits=FEW_BITS)
    check_disk(folder, len(made) * folder_bytes(source.path))
    for name, wanted in progress(made.items(), "artifacts to measure", "artifact"):
        _write(source, folder / name, wanted, export)
    probes = Probes(source.path.name, _made_of(source, options, export), tuple(ids.tolist()), new, tuple(made))
    write_json(folder / DESCRIPTION, object_of(probes))
    return probes


def _write(source: Artifact, out: Path, options: QuantizeOptions, export: ExportOptions) -> None:
    """An artifact to be measured and thrown away: not proven, for only what it takes is asked of it."""
    packed = out.with_name(f"{out.name}-packed")
    packed.mkdir()
    out.mkdir()
    level = log.level
    log.setLevel(logging.WARNING)  # what it says of blocks and exporters is for the stages that ship something
    try:
        quantize_checkpoint(source, packed, options, out)
        draft(Checkpoint(packed, options.trust_remote_code), out, replace(export, trust_remote_code=options.trust_remote_code))
    finally:
        log.setLevel(level)
    shutil.rmtree(packed)
    release_memory()
