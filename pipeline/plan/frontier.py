"""What could be made of a model: artifacts of all sizes, and the best of those that keep to some bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import BoundOptions, ExportOptions, PlanOptions, QuantizeOptions, size_in_bytes
from edgepress.pipeline.plan.probes import busy
from edgepress.pipeline.plan.speed import Speeds, speeds_of
from edgepress.pipeline.quantize.budget import Costs, Fit, fit, largest_size, least_size
from edgepress.pipeline.quantize.choose import left_of, left_of_head
from edgepress.pipeline.quantize.mix import CHOICES, mean_bits
from edgepress.pipeline.quantize.trials import costs_of
from edgepress.pipeline.report.forecast import DECODE, MEMORY, TTFT, Bound, Forecast, Point, Usage

POINTS = 12
HALVINGS = 5  # between a size that keeps to the bounds and a larger one that does not: to a thirtieth of a step
USELESS = 1.0  # growth of perplexity from which on the smaller ones are left out


@dataclass(frozen=True)
class Frontier(Forecast):
    """A forecast; lasting: whether nothing disturbed the measuring."""

    lasting: bool = True


def frontier(source: Artifact, options: PlanOptions, export: ExportOptions | None = None) -> Frontier:
    """The best artifact of each of a dozen sizes, and the one of least loss that keeps to all bounds, where some are given.

    Losses are expected of the sum of what every matrix costs. export: how they would be exported, which decides their speed
    (default: as with no flags). Raises OptionError where no artifact keeps to the bounds.
    """
    disturbed = options.speed and options.machine is None and busy()  # asked now: soon this process keeps the processor busy
    given, export = options.quantize(), export or ExportOptions()
    # a file that suits nothing is refused before minutes of measuring
    speeds = speeds_of(source, options, export) if options.machine is not None else None
    costs = costs_of(source, given)
    if options.speed and speeds is None:
        speeds = speeds_of(source, options, export, disturbed)

    @cache
    def point(within: float, native: bool = options.native_bits) -> Point:
        return _point(costs, round(within), given, speeds, native)

    least, largest = least_size(costs) + 1, largest_size(costs)
    sizes = np.geomspace(least, largest, POINTS)
    points = [point(within, native=options.native_bits) for within in sizes]
    where = speeds.machine if speeds and speeds.machine else "this machine"
    shown = {one.size: one for one in points if one.growth < USELESS} or {points[-1].size: points[-1]}
    if options.max_size is not None or options.given:
        size = math.inf if options.max_size is None else size_in_bytes(options.max_size, "--max-size")
        if size < largest:
            sizes = np.array([within for within in sizes if round(within) < size] + [size])
        # fewest bytes, or what reads and holds least of them: a bound may call for either
        ways = (True, False) if options.given and not options.native_bits else (options.native_bits,)
        best = replace(_best([_Way(sizes, partial(point, native=native)) for native in ways], options, where), asked=True)
        shown[best.size] = best
    ordered = tuple(shown[size] for size in sorted(shown))
    if speeds is None:
        return Frontier(ordered)
    return Frontier(ordered, speeds.prompt, bounds_of(options, speeds.prompt), speeds.machine, speeds.lasting)


@dataclass(frozen=True)
class _Way:
    """To choose an artifact: sizes to look at first, and what makes the best one within a size."""

    sizes: np.ndarray
    point: Callable[[float], Point]


def _best(ways: Sequence[_Way], options: PlanOptions, where: str) -> Point:
    """The one of least loss that keeps to the bounds. Raises OptionError, which says ``where``, if none does."""
    found: list[Point] = []
    seen: list[Point] = []
    for way in ways:
        found += _best_of(way, options, seen)
    if not found:
        raise OptionError(_nearest(seen, options, where))
    return min(found, key=lambda one: (one.growth, one.size))


def _best_of(way: _Way, options: PlanOptions, seen: list[Point]) -> list[Point]:
    """The same of one way, [] where none keeps to them. seen: grows by what was looked at."""

    def keeps(one: Point) -> bool:
        return all(excess <= 1 for _, excess in _of(one, options))

    points = [way.point(within) for within in way.sizes]
    kept = [one for one in points if keeps(one)]
    if not kept:  # two bounds that pull apart may be kept to between two points
        near = min(range(len(points)), key=lambda number: _worst(points[number], options))
        ends = points[max(0, near - 1)].within, points[min(len(points) - 1, near + 1)].within
        points = [way.point(within) for within in np.geomspace(*ends, POINTS)]
        kept = [one for one in points if keeps(one)]
    seen += points
    if not kept:
        return []
    best = min(kept, key=lambda one: (one.growth, one.size))
    low, high = best.within, next((one.within for one in points if one.within > best.within), best.within)
    for _ in range(HALVINGS if low < high else 0):
        middle = way.point((low + high) // 2)
        if keeps(middle):
            best, low = min(best, middle, key=lambda one: (one.growth, one.size)), middle.within
        else:
            high = middle.within
    return [best]


def _point(costs: Costs, within: int, options: QuantizeOptions, speeds: Speeds | None, native: bool) -> Point:
    found: Fit = fit(costs, within, CHOICES[native])
    head = costs.head[found.head]
    lost = left_of(options, found.forms) * (found.cost - head) + left_of_head(options, found.head) * head
    growth = math.expm1(min(lost, 50.0))
    usage = speeds.of(costs, found) if speeds else None
    bits, of_head = round(mean_bits(costs.items, found.forms), 2), round(found.head.mean_bits(costs.ends.vocabulary), 1)
    return Point(within, found.size, bits, of_head, growth, usage, native=native)


def bounds_of(options: BoundOptions, prompt: int) -> tuple[Bound, ...]:
    """Those that are given. prompt: tokens before the first one."""
    bounds = []
    if options.max_memory is not None:
        bounds.append(Bound("--max-memory", options.max_memory, MEMORY, size_in_bytes(options.max_memory, "--max-memory")))
    if options.min_speed is not None:
        bounds.append(Bound("--min-speed", f"{options.min_speed:g}", DECODE, options.min_speed, at_least=True))
    if options.max_ttft is not None:
        bounds.append(Bound("--max-ttft", f"{options.max_ttft:g}", f"{TTFT}{prompt}", options.max_ttft))
    return tuple(bounds)


def _excesses(usage: Usage, options: BoundOptions) -> Iterator[tuple[str, float]]:
    """The flag of each bound that is given, and by what factor a usage exceeds it: above 1 where it is not kept to."""
    expected = {DECODE: 1 / usage.decode_s, TTFT: 1000 * usage.ttft_s, MEMORY: usage.memory}
    for bound in bounds_of(options, 0):
        value = expected[TTFT if bound.figure.startswith(TTFT) else bound.figure]
        if value is None:
            raise OptionError("this system does not report the memory of a process; leave --max-memory out")
        yield bound.flag, bound.excess(value)


def _of(point: Point, bounds: BoundOptions) -> list[tuple[str, float]]:
    return [] if point.usage is None else list(_excesses(point.usage, bounds))


def _worst(point: Point, bounds: BoundOptions) -> float:
    return max(excess for _, excess in _of(point, bounds))


def _nearest(points: Sequence[Point], options: PlanOptions, where: str) -> str:
    """Why nothing keeps to the bounds, and what comes nearest."""
    best = min(points, key=lambda point: _worst(point, options))
    missed = " and ".join(name for name, excess in _of(best, options) if excess > 1)
    within = "" if options.max_size is None else f" of at most {options.max_size}"
    assert best.usage is not None
    return (
        f"no artifact of this model{within} keeps to {missed} on {where}; nearest is one of {best.size / 1e6:.1f} MB: "
        f"{said(best.usage)}, {100 * best.growth:+.0f} % of perplexity; ask for less, or build from a model that was made smaller "
        "before (edgepress prune, narrow or trim)"
    )


def said(usage: Usage) -> str:
    """``207 tokens/s, 61 ms to the first token, 254 MB of memory``."""
    memory = "" if usage.memory is None else f", {usage.memory / 1e6:.0f} MB of memory"
    return f"{1 / usage.decode_s:.0f} tokens/s, {1000 * usage.ttft_s:.0f} ms to the first token{memory}"


def table(found: Frontier) -> str:
    """The points as text, and what to give a build for one of them."""
    timed = bool(found.prompt)
    head = "      MB  bits a weight  head  perplexity, expected"
    lines = [head + (f"  tokens/s  first of {found.prompt}  peak MB" if timed else "") + "  build with"]
    for point in found.points:
        row = f"{point.size / 1e6:>8.1f}  {point.bits:>13.2f}  {point.head_bits:>4g}  {f'{100 * point.growth:+.1f} %':>20}"
        if timed and (usage := point.usage):
            memory = "" if usage.memory is None else f"{usage.memory / 1e6:.0f}"
            first = f"{1000 * usage.ttft_s:.0f} ms"
            row += f"  {1 / usage.decode_s:>8.0f}  {first:>{len(f'first of {found.prompt}')}}  {memory:>7}"
        native = " --native-bits" if point.native else ""
        lines.append(f"{row}  --max-size {point.proposal}{native}" + ("  <- asked for" if point.asked else ""))
    if found.machine:
        lines += ["", f"speeds and memory: {found.machine}"]
    return "\n".join(lines)
