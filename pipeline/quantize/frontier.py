"""What could be made of a model: artifacts from the smallest to 8 bits everywhere, and what each is expected to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions, size_in_bytes
from edgepress.pipeline.quantize.budget import Costs, Fit, fit, largest_size, least_size
from edgepress.pipeline.quantize.choose import CALIBRATED, TUNED_MIX, costs_of, quantized_before
from edgepress.pipeline.quantize.mix import mean_bits

POINTS = 12
USELESS = 1.0  # growth of perplexity from which on the smaller ones are left out
MARGIN = 1.002  # on a size that is proposed, which is rounded


@dataclass(frozen=True)
class Point:
    """One artifact: its size in bytes, bits of a block weight, bits of the head, and how much perplexity grows, a share.

    asked: whether its size was asked for.
    """

    size: int
    bits: float
    head_bits: int
    growth: float
    asked: bool = False


def frontier(source: Artifact, options: QuantizeOptions) -> list[Point]:
    """The best artifact of each of a dozen sizes, and of ``options.max_size`` where that is given, by size.

    The growth is expected of the sum of what every matrix costs. Raises OptionError where no artifact has ``max_size``.
    """
    costs = costs_of(source, options)
    left = CALIBRATED if options.method == "gptq" and not quantized_before(source) else 1.0
    left *= TUNED_MIX if options.tuned else 1.0
    sizes = np.geomspace(least_size(costs) + 1, largest_size(costs), POINTS)
    points = {_point(costs, fit(costs, round(size)), left) for size in sizes}
    useful = [point for point in points if point.growth < USELESS] or [max(points, key=lambda point: point.size)]
    if options.max_size is not None:
        useful.append(_point(costs, fit(costs, size_in_bytes(options.max_size, "--max-size")), left, asked=True))
    return sorted(useful, key=lambda point: point.size)


def _point(costs: Costs, found: Fit, left: float, asked: bool = False) -> Point:
    head = costs.head[found.head_bits]
    growth = math.expm1(min(left * (found.cost - head) + head, 50.0))
    return Point(found.size, round(mean_bits(costs.items, found.forms), 2), found.head_bits, growth, asked)


def table(points: Sequence[Point]) -> str:
    """The points as text, and what to give a build for one of them."""
    lines = ["      MB  bits a weight  head  perplexity, expected  build with"]
    for point in points:
        size = f"--max-size {math.ceil(MARGIN * point.size / 1e5) / 10:g}MB"
        lines.append(
            f"{point.size / 1e6:>8.1f}  {point.bits:>13.2f}  {point.head_bits:>4}  {f'{100 * point.growth:+.1f} %':>20}  {size}"
            + ("  <- asked for" if point.asked else "")
        )
    return "\n".join(lines)
