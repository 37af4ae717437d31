"""The artifact of least loss that keeps to what a build was asked for, and how it came out."""

from __future__ import annotations

import hashlib
import json
import logging
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
from edgepress.pipeline.plan.speed import Cost, busy
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.model import read
from edgepress.pipeline.stages import record

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Planned:
    """chosen_for: hash of model, machine and options. prompt: tokens before the first one of the point's cost.

    lasting: whether nothing disturbed the measurement; else it is made anew once nothing does.
    """

    chosen_for: str
    point: Point
    prompt: int
    lasting: bool = True

    @property
    def max_size(self) -> str:
        """For the quantize stage: what the point was asked for by, so that the same is found."""
        return f"{self.point.within}B"


def planned(source: Artifact, options: PlanOptions, export: ExportOptions, kept: Path) -> Planned:
    """What a build makes of ``source``, as it was chosen before for the same bounds (in the file ``kept``), or now.

    export: how it will be exported. Raises OptionError where nothing keeps to them.
    """
    how = [record(options), record(export), asdict(machine("cpu")), version("edgepress")]
    key = hashlib.sha256(json.dumps([source.identity(), *how], sort_keys=True).encode()).hexdigest()
    found = None
    with suppress(InputError, ValueError):
        found = typed(Planned, read_json(kept))
    if found is None or found.chosen_for != key or not (found.lasting or busy()):
        log.info("plan: what every matrix costs, and how fast three artifacts of this model are here (kept for the next time)")
        line = frontier(source, options, export)
        assert line.asked is not None
        found = Planned(key, line.asked, line.prompt, line.lasting)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(found))
    point = found.point
    assert point.cost is not None
    log.info(
        "plan: --max-size %s, %.2f bits a weight and %d in the head; expected: %s, %+.1f %% of perplexity",
        point.proposal, point.bits, point.head_bits, said(point.cost), 100 * point.growth,
    )  # fmt: skip
    return found


def compare(found: Planned, bounds: BoundOptions, report: Path) -> None:
    """Say what a report measured of what was planned, and warn of a bound that is not kept to."""
    first = read(report).first
    names = ("speed.decode_tokens_per_s", f"speed.ttft_ms.{found.prompt}", "memory.peak_rss_bytes")
    speed, wait, memory = (first.figures[name].median if name in first.figures else None for name in names)
    if speed is None or wait is None:
        log.warning("warning: speed or the first token after %d were not measured, so no bound could be checked", found.prompt)
        return
    measured = Cost(1 / speed, wait / 1000, memory)
    assert found.point.cost is not None
    whole = " of the whole model" if first.removed else ""
    log.info(
        "plan: expected%s %.1f MB, %s; measured %.1f MB, %s",
        whole, found.point.size / 1e6, said(found.point.cost), first.figures["size.total_bytes"].median / 1e6, said(measured),
    )  # fmt: skip
    for name, excess in excesses(measured, bounds):
        if excess > 1:
            log.warning(
                "warning: the artifact misses %s by %.0f %% as measured; give a tighter bound, or try again when nothing else runs",
                name, 100 * (excess - 1),
            )  # fmt: skip
