"""What could be made of a model: artifacts of all sizes, and the best of those that keep to some bounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import PlanOptions, size_in_bytes
from edgepress.pipeline.plan.speed import Cost, Speeds, speeds_of
from edgepress.pipeline.quantize.budget import Costs, Fit, fit, largest_size, least_size
from edgepress.pipeline.quantize.choose import CALIBRATED, TUNED_MIX, costs_of, quantized_before
from edgepress.pipeline.quantize.mix import mean_bits

log = logging.getLogger("edgepress")
POINTS = 12
HALVINGS = 5  # between a size that keeps to the bounds and a larger one that does not: to a thirtieth of a step
USELESS = 1.0  # growth of perplexity from which on the smaller ones are left out
MARGIN = 1.002  # on a size that is proposed, which is rounded


@dataclass(frozen=True)
class Point:
    """One artifact: its size in bytes, bits of a block weight, bits of the head, and how much perplexity grows, a share.

    cost: what running it is expected to take, None where that is not asked for. asked: whether it was asked for.
    """

    size: int
    bits: float
    head_bits: int
    growth: float
    cost: Cost | None = None
    asked: bool = False

    @property
    def proposal(self) -> str:
        """What --max-size makes it."""
        return f"{math.ceil(MARGIN * self.size / 1e5) / 10:g}MB"


@dataclass(frozen=True)
class Frontier:
    """Points by size. prompt: tokens before the first one of a point's cost."""

    points: tuple[Point, ...]
    prompt: int = 0

    @property
    def asked(self) -> Point | None:
        """The one that was asked for."""
        return next((point for point in self.points if point.asked), None)


def frontier(source: Artifact, options: PlanOptions) -> Frontier:
    """The best artifact of each of a dozen sizes, and the one of least loss that keeps to all bounds, where some are given.

    Losses are expected of the sum of what every matrix costs. Raises OptionError where no artifact keeps to the bounds.
    """
    given = options.quantize()
    # Speeds first: what comes before keeps the processor busy.
    speeds = speeds_of(source, given, options.text, options.text_key, options.threads) if options.speed else None
    costs = costs_of(source, given)
    left = CALIBRATED if given.method == "gptq" and not quantized_before(source) else 1.0
    left *= TUNED_MIX if given.tuned else 1.0

    def point(size: float, asked: bool = False) -> Point:
        return _point(costs, fit(costs, round(size)), left, speeds, asked)

    least, largest = least_size(costs) + 1, largest_size(costs)
    points = sorted({point(size) for size in np.geomspace(least, largest, POINTS)}, key=lambda one: one.size)
    useful = [one for one in points if one.growth < USELESS] or points[-1:]
    if options.max_size is not None or options.given:
        size = math.inf if options.max_size is None else size_in_bytes(options.max_size, "--max-size")
        if size < largest:
            points = [one for one in points if one.size < size] + [point(size)]
        kept = [one for one in points if _keeps(one, options)]
        if not kept:
            raise OptionError(_nearest(points, options))
        best = max(kept, key=lambda one: (-one.growth, -one.size))
        larger = [one for one in points if one.size > best.size]
        low, high = best.size, larger[0].size if larger else best.size
        for _ in range(HALVINGS if low < high else 0):
            middle = (low + high) // 2
            if _keeps(point(middle), options):
                low = middle
            else:
                high = middle
        useful = [one for one in useful if one.size != low] + [point(low, asked=True)]
    return Frontier(tuple(sorted(useful, key=lambda one: one.size)), speeds.prompt if speeds else 0)


def _point(costs: Costs, found: Fit, left: float, speeds: Speeds | None, asked: bool) -> Point:
    head = costs.head[found.head_bits]
    growth = math.expm1(min(left * (found.cost - head) + head, 50.0))
    cost = speeds.of(costs, found) if speeds else None
    return Point(found.size, round(mean_bits(costs.items, found.forms), 2), found.head_bits, growth, cost, asked)


def _excesses(point: Point, options: PlanOptions) -> Iterator[tuple[str, float]]:
    """The flag of each bound that is given, and by what factor a point exceeds it: above 1 where it does not keep to it."""
    cost = point.cost
    if cost is None:
        return
    if options.max_memory is not None:
        if cost.memory is None:
            raise OptionError("this system does not report the memory of a process; leave --max-memory out")
        yield "--max-memory", cost.memory / size_in_bytes(options.max_memory, "--max-memory")
    if options.min_speed is not None:
        yield "--min-speed", options.min_speed * cost.decode_s
    if options.max_ttft is not None:
        yield "--max-ttft", 1000 * cost.ttft_s / options.max_ttft


def _keeps(point: Point, options: PlanOptions) -> bool:
    return all(excess <= 1 for _, excess in _excesses(point, options))


def _nearest(points: Sequence[Point], options: PlanOptions) -> str:
    """Why nothing keeps to the bounds, and what comes nearest."""
    best = min(points, key=lambda point: max(excess for _, excess in _excesses(point, options)))
    missed = " and ".join(name for name, excess in _excesses(best, options) if excess > 1)
    within = "" if options.max_size is None else f" of at most {options.max_size}"
    assert best.cost is not None
    return (
        f"no artifact of this model{within} keeps to {missed} on this machine; nearest is one of {best.size / 1e6:.1f} MB: "
        f"{said(best.cost)}; ask for less, or make the model smaller first (--remove-count, --remove-channels, edgepress trim)"
    )


def said(cost: Cost) -> str:
    """``207 tokens/s, 61 ms to the first token, 254 MB of memory``."""
    memory = "" if cost.memory is None else f", {cost.memory / 1e6:.0f} MB of memory"
    return f"{1 / cost.decode_s:.0f} tokens/s, {1000 * cost.ttft_s:.0f} ms to the first token{memory}"


def table(found: Frontier) -> str:
    """The points as text, and what to give a build for one of them."""
    timed = bool(found.prompt)
    head = "      MB  bits a weight  head  perplexity, expected"
    lines = [head + (f"  tokens/s  first of {found.prompt}  peak MB" if timed else "") + "  build with"]
    for point in found.points:
        row = f"{point.size / 1e6:>8.1f}  {point.bits:>13.2f}  {point.head_bits:>4}  {f'{100 * point.growth:+.1f} %':>20}"
        if timed and (cost := point.cost):
            memory = "" if cost.memory is None else f"{cost.memory / 1e6:.0f}"
            first = f"{1000 * cost.ttft_s:.0f} ms"
            row += f"  {1 / cost.decode_s:>8.0f}  {first:>{len(f'first of {found.prompt}')}}  {memory:>7}"
        lines.append(f"{row}  --max-size {point.proposal}" + ("  <- asked for" if point.asked else ""))
    return "\n".join(lines)
