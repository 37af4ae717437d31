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
from edgepress.pipeline.options import PlanOptions
from edgepress.pipeline.plan.frontier import Point, frontier, said
from edgepress.pipeline.plan.speed import Cost
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.model import read
from edgepress.pipeline.stages import record

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Planned:
    """chosen_for: hash of model, machine and bounds. prompt: tokens before the first one of the point's cost."""

    chosen_for: str
    point: Point
    prompt: int

    @property
    def max_size(self) -> str:
        """For the quantize stage: to the byte, so that it finds the same."""
        return f"{self.point.size}B"


def planned(source: Artifact, options: PlanOptions, kept: Path) -> Planned:
    """What a build makes of ``source``, as it was chosen before for the same bounds (in the file ``kept``), or now.

    Raises OptionError where nothing keeps to them.
    """
    ingredients = [source.identity(), record(options), asdict(machine("cpu")), version("edgepress")]
    key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    found = None
    with suppress(InputError, ValueError):
        found = typed(Planned, read_json(kept))
    if found is None or found.chosen_for != key:
        log.info("plan: what every matrix costs, and how fast three artifacts of this model are here (kept for the next time)")
        line = frontier(source, options)
        assert line.asked is not None and line.asked.cost is not None
        found = Planned(key, line.asked, line.prompt)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(found))
    point = found.point
    assert point.cost is not None
    log.info(
        "plan: --max-size %s, %.2f bits a weight and %d in the head; expected: %s, %+.1f %% of perplexity",
        point.proposal, point.bits, point.head_bits, said(point.cost), 100 * point.growth,
    )  # fmt: skip
    return found


def compare(found: Planned, report: Path) -> None:
    """Say what a report measured of what was planned."""
    figures = read(report).first.figures
    names = ("speed.decode_tokens_per_s", f"speed.ttft_ms.{found.prompt}", "memory.peak_rss_bytes")
    speed, first, memory = (figures[name].median if name in figures else None for name in names)
    if speed is None or first is None or found.point.cost is None:
        return
    size = figures["size.total_bytes"].median
    log.info(
        "plan: expected %.1f MB, %s; measured %.1f MB, %s",
        found.point.size / 1e6, said(found.point.cost), size / 1e6, said(Cost(1 / speed, first / 1000, memory)),
    )  # fmt: skip
