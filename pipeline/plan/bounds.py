"""The artifact of least loss that keeps to what a build was asked for, and how it came out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import machine
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.options import BoundOptions, ExportOptions, PlanOptions
from edgepress.pipeline.plan.frontier import Point, excesses, frontier, said
from edgepress.pipeline.plan.speed import Usage
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.report.model import read
from edgepress.pipeline.stages import record

_NOISE = 0.01  # of a bound: two measurements of one artifact differ by more
log = logging.getLogger("edgepress")
_DECODE, _TTFT, _MEMORY = "speed.decode_tokens_per_s", "speed.ttft_ms.", "memory.peak_rss_bytes"


@dataclass(frozen=True)
class Planned:
    """chosen_for: hash of model, machine and options. prompt: tokens before the first one of the point's usage.

    lasting: whether nothing disturbed the measurement.
    """

    chosen_for: str
    point: Point
    prompt: int
    lasting: bool = True

    @property
    def max_size(self) -> str:
        """For the quantize stage: what the point was found by, to the byte, so that the same is found."""
        return self.point.proposal


def planned(source: Artifact, options: PlanOptions, export: ExportOptions, kept: Path) -> Planned:
    """What a build makes of ``source``, as it was chosen before for the same bounds (in the file ``kept``), or now.

    What was chosen stays, however busy the machine was: a build that goes on must find its finished stages.
    export: how it will be exported. Raises OptionError where nothing keeps to them.
    """
    here = machine("cpu")  # no kernel and no version of a package: an update must not choose anew
    how = [record(options), record(export), asdict(here.cpu), here.cores, version("edgepress")]
    key = hashlib.sha256(json.dumps([source.identity(), *how], sort_keys=True).encode()).hexdigest()
    found = None
    with suppress(InputError, ValueError):
        found = typed(Planned, read_json(kept))
    if found is not None and found.chosen_for == key:
        if not found.lasting:
            log.warning("warning: other programs were busy when this plan was made; delete %s to make it anew", kept)
    else:
        log.info("plan: what every matrix costs, and how fast four artifacts of this model are here (kept for the next time)")
        line = frontier(source, options, export)
        assert line.asked is not None
        found = Planned(key, line.asked, line.prompt, line.lasting)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(found))
    point = found.point
    assert point.usage is not None
    log.info(
        "plan: --max-size %s, %.2f bits a weight and %d in the head; expected: %s, %+.1f %% of perplexity",
        found.max_size, point.bits, point.head_bits, said(point.usage), 100 * point.growth,
    )  # fmt: skip
    if point.growth > WORRYING - 1:
        log.warning("warning: an artifact that loses so much is of little use; give a looser bound (edgepress plan shows which)")
    return found


def compare(found: Planned, bounds: BoundOptions, report: Path) -> None:
    """Say what a report measured of what was planned, and warn of a bound that is not kept to, or that nothing measured."""
    first = read(report).first
    names = {"--min-speed": _DECODE, "--max-ttft": f"{_TTFT}{found.prompt}", "--max-memory": _MEMORY}
    speed, wait, memory = (first.figures[name].median if name in first.figures else None for name in names.values())
    expected = found.point.usage
    assert expected is not None
    log.info(
        "plan: expected%s %.1f MB, %s, %+.1f %% of perplexity; measured %.1f MB, %s",
        " of the whole model" if first.removed else "", found.point.size / 1e6, said(expected), 100 * found.point.growth,
        first.figures["size.total_bytes"].median / 1e6, _measured(speed, wait, memory, first.perplexities),
    )  # fmt: skip
    longest = max((int(name.removeprefix(_TTFT)) for name in first.figures if name.startswith(_TTFT)), default=found.prompt)
    taken = Usage(1 / speed if speed else 0.0, wait / 1000 if wait else 0.0, memory or 0.0)
    for flag, excess in excesses(taken, bounds):
        if not excess:
            log.warning("warning: nothing measured what %s bounds", flag)
        elif excess > 1 + _NOISE:
            longer = f" (of prompts of up to {longest} tokens, and planned for {found.prompt})" if longest > found.prompt else ""
            log.warning(
                "warning: the artifact misses %s by %.0f %% as measured%s; give a tighter bound, or try again when nothing "
                "else runs",
                flag, 100 * (excess - 1), longer if flag == "--max-memory" else "",
            )  # fmt: skip


def _measured(speed: float | None, wait: float | None, memory: float | None, perplexities: Mapping[str, float]) -> str:
    """What there is of it, as ``said`` says it."""
    parts = (
        f"{speed:.0f} tokens/s" if speed else "",
        f"{wait:.0f} ms to the first token" if wait else "",
        f"{memory / 1e6:.0f} MB of memory" if memory else "",
        f"{100 * (perplexities['onnx'] / perplexities['original'] - 1):+.1f} % of perplexity"
        if {"onnx", "original"} <= perplexities.keys()
        else "",
    )
    return ", ".join(filter(None, parts)) or "nothing else"
