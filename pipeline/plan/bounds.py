"""The artifact of least loss that keeps to what a build was asked for, and how it came out."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.environment import machine
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json, sha256, write_json
from edgepress.pipeline.options import ExportOptions, PlanOptions
from edgepress.pipeline.plan.frontier import frontier, said
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.report.forecast import DECODE, MEMORY, SIZE, TTFT, Forecast, Point
from edgepress.pipeline.report.model import read
from edgepress.pipeline.stages import record

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Planned:
    """chosen_for: hash of model, machine and options. lasting: whether nothing disturbed the measurement."""

    chosen_for: str
    forecast: Forecast
    lasting: bool = True

    @property
    def point(self) -> Point:
        """The one that was chosen."""
        assert self.forecast.asked is not None
        return self.forecast.asked

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
    where = [asdict(here.cpu), here.cores] if options.machine is None else [sha256(options.machine)]
    how = [record(replace(options, machine=None)), record(export), *where, version("edgepress")]
    key = hashlib.sha256(json.dumps([source.identity(), *how], sort_keys=True).encode()).hexdigest()
    found = None
    with suppress(InputError, ValueError):
        found = typed(Planned, read_json(kept))
    if found is not None and found.chosen_for == key:
        if not found.lasting:
            log.warning("warning: other programs were busy when this plan was made; delete %s to make it anew", kept)
    else:
        speeds = "how fast five artifacts of this model are here" if options.machine is None else f"speeds of {options.machine}"
        log.info("plan: what every matrix costs, and %s (kept for the next time)", speeds)
        line = frontier(source, options, export)
        found = Planned(key, Forecast(line.points, line.prompt, line.bounds, line.machine), line.lasting)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(found))
    point = found.point
    assert point.usage is not None
    native = " --native-bits" if point.native else ""
    log.info(
        "plan: --max-size %s%s, %.2f bits a weight and %g in the head; expected: %s, %+.1f %% of perplexity",
        found.max_size, native, point.bits, point.head_bits, said(point.usage), 100 * point.growth,
    )  # fmt: skip
    if point.growth > WORRYING - 1:
        log.warning("warning: an artifact that loses so much is of little use; give a looser bound (edgepress plan shows which)")
    return found


def compare(found: Planned, report: Path) -> None:
    """Say what a report measured of what was planned, and warn of a bound that is not kept to, or that nothing measured."""
    first = read(report).first
    names = (DECODE, f"{TTFT}{found.forecast.prompt}", MEMORY)
    elsewhere = found.forecast.machine
    speed, wait, memory = (first.figures[name].median if name in first.figures and not elsewhere else None for name in names)
    expected = found.point.usage
    assert expected is not None
    log.info(
        "plan: expected%s%s %.1f MB, %s, %+.1f %% of perplexity; measured%s %.1f MB, %s",
        " of the whole model" if first.removed else "", f" on {elsewhere}" if elsewhere else "", found.point.size / 1e6,
        said(expected), 100 * found.point.growth, " here" if elsewhere else "", first.figures[SIZE].median / 1e6,
        _measured(speed, wait, memory, first.growth),
    )  # fmt: skip
    if elsewhere:
        log.info("plan: to see what it takes there, run edgepress bench on the artifact there")
    for finding in first.missed(found.forecast):
        log.warning("warning: %s; give a tighter bound, or try again when nothing else runs", finding)


def _measured(speed: float | None, wait: float | None, memory: float | None, growth: float | None) -> str:
    """What there is of it, as ``said`` says it."""
    parts = (
        f"{speed:.0f} tokens/s" if speed else "",
        f"{wait:.0f} ms to the first token" if wait else "",
        f"{memory / 1e6:.0f} MB of memory" if memory else "",
        f"{100 * growth:+.1f} % of perplexity" if growth is not None else "",
    )
    return ", ".join(filter(None, parts)) or "nothing else"
