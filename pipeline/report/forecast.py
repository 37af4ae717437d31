"""What `edgepress plan` expected before an artifact was made: what else could have been, and the bounds that it was chosen by."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECODE, TTFT, MEMORY, SIZE = "speed.decode_tokens_per_s", "speed.ttft_ms.", "memory.peak_rss_bytes", "size.total_bytes"


@dataclass(frozen=True)
class Usage:
    """What running an artifact takes: seconds a token, seconds to the first token of the prompt, bytes of memory at the peak.

    memory: None where the system does not report it.
    """

    decode_s: float
    ttft_s: float
    memory: float | None


@dataclass(frozen=True)
class Point:
    """One artifact: its size in bytes, bits of a block weight, bits of the head, and how much perplexity grows, a share.

    within: bytes that it was found by, at least its size. usage: what running it is expected to take, None where that is not asked
    for. asked: whether it was asked for. native: whether it was chosen among bits that onnxruntime computes with.
    """

    within: int
    size: int
    bits: float
    head_bits: float
    growth: float
    usage: Usage | None = None
    asked: bool = False
    native: bool = False

    @property
    def proposal(self) -> str:
        """What --max-size makes it: what was asked for to the byte, for more would be another artifact; else a round number."""
        if self.asked:
            return f"{self.within / 1e6:.6f}".rstrip("0").rstrip(".") + "MB"
        return f"{math.ceil(MARGIN * self.size / 1e5) / 10:g}MB"


MARGIN = 1.002  # on a size that is proposed, which is rounded


@dataclass(frozen=True)
class Bound:
    """A flag that was given, its value as it was written, the figure that it bounds, and by what: at least it, or at most."""

    flag: str
    given: str
    figure: str
    limit: float
    at_least: bool = False

    def excess(self, measured: float) -> float:
        """By what factor a measured figure exceeds the bound: above 1 where it is not kept to."""
        return self.limit / measured if self.at_least else measured / self.limit


@dataclass(frozen=True)
class Forecast:
    """Points by size, one of them asked for. prompt: tokens before the first one of a point's usage.

    machine: on which it is expected, "" for the one that measures what was made.
    """

    points: tuple[Point, ...]
    prompt: int = 0
    bounds: tuple[Bound, ...] = ()
    machine: str = ""

    @property
    def asked(self) -> Point | None:
        """The one that was asked for."""
        return next((point for point in self.points if point.asked), None)


def header(forecast: Forecast) -> list[str]:
    """Of ``rows``."""
    return ["artifact", "size", "bits a weight", "head", "perplexity", "decode", f"TTFT @{forecast.prompt}", "peak RSS"]


def rows(forecast: Forecast, figures: dict[str, float], growth: float | None) -> list[list[str]]:
    """A row for each point, and behind the one that was made what was measured of it.

    figures: medians of what was measured, by name. growth: of perplexity, a share.
    """
    shown = []
    for point in forecast.points:
        usage = point.usage
        running = (1 / usage.decode_s, 1000 * usage.ttft_s, usage.memory) if usage else (None, None, None)
        cells = _cells(point.size, point.growth, *running)
        name = ("expected, chosen" if point.asked else "expected") + (", 2, 4 and 8 bits alone" if point.native else "")
        shown.append([name, cells[0], f"{point.bits:.2f}", f"{point.head_bits:g}", *cells[1:]])
        if point.asked:
            of_machine = () if forecast.machine else (DECODE, f"{TTFT}{forecast.prompt}", MEMORY)
            got = [figures.get(name) for name in of_machine] or [None, None, None]
            size, *rest = _cells(figures.get(SIZE), growth, *got)
            shown.append(["measured", size, "", "", *rest])
    return shown


def _cells(size: float | None, growth: float | None, speed: float | None, wait: float | None, memory: float | None) -> list[str]:
    forms = (
        (size, lambda x: f"{x / 1e6:.1f} MB"), (growth, lambda x: f"{100 * x:+.1f} %"), (speed, lambda x: f"{x:.0f} tokens/s"),
        (wait, lambda x: f"{x:.0f} ms"), (memory, lambda x: f"{x / 1e6:.0f} MB"),
    )  # fmt: skip
    return ["" if value is None else form(value) for value, form in forms]
