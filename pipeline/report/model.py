"""The values of a report, and report.json: written and read here alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, read_json, write_json
from edgepress.pipeline.report.forecast import MEMORY, TTFT, Forecast
from edgepress.pipeline.report.plain import object_of
from edgepress.pipeline.report.steps import Quantization, Step
from edgepress.pipeline.visible import one_line

SCHEMA = 3
# Beginnings of the names of figures that are above 0 wherever they are measured.
_POSITIVE = ("size.total_bytes", "load.", "memory.", "speed.")
# Samples from which on percentiles are given.
MANY = 20
NOISE = 0.01  # of a bound: two measurements of one artifact differ by more


@dataclass(frozen=True)
class Figure:
    """All raw samples of one quantity in ``unit``. standard_error: where the value is itself a mean over many items."""

    unit: str
    values: tuple[float | int, ...]  # a whole number stays one
    standard_error: float | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a figure has no values")

    @classmethod
    def of(cls, unit: str, values: Iterable[float], standard_error: float | None = None) -> Figure:
        """From measured samples, of which 8 digits are kept."""
        return cls(unit, tuple(float(f"{v:.8g}") if isinstance(v, float) else v for v in values), standard_error)

    @property
    def median(self) -> float:
        """Of the samples, in ``unit``."""
        return float(np.median(self.values))

    @property
    def percentiles(self) -> dict[int, float]:
        """The 50th, 95th and 99th, where there are samples enough for them."""
        return {q: float(np.percentile(self.values, q)) for q in (50, 95, 99)} if len(self.values) >= MANY else {}


@dataclass(frozen=True)
class StageRow:
    """Quality after one stage, every row on the same tokens; ``bytes`` of weights. failed: why it could not be scored.

    Losses and divergences are in nats a token. change_nats and token_change_nats: mean and mean absolute change of a token's loss
    from the row before; share: of the whole loss. suspect: why the stage is not to be trusted.
    """

    name: str
    bytes: int
    perplexity: float | None = None
    tokens: int | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    bits_per_byte: float | None = None
    change_nats: float | None = None
    token_change_nats: float | None = None
    share: float | None = None
    suspect: str | None = None
    failed: str | None = None

    def __post_init__(self) -> None:
        if self.perplexity is None and self.failed is None:
            raise ValueError(f"stage {self.name} has neither perplexity nor the reason why it failed")
        if self.perplexity is not None and self.perplexity <= 0:
            raise ValueError(f"stage {self.name} has a perplexity of {self.perplexity}")


@dataclass(frozen=True)
class Parting:
    """The first words in which two answers differ, and how likely the original held either; 0 for less than 1 %."""

    original: str
    artifact: str
    original_chance: float
    artifact_chance: float


@dataclass(frozen=True)
class Answer:
    """What the original and the shipped files answer, greedily, to the same question or passage of a text."""

    asked: str
    original: str
    artifact: str
    parting: Parting | None = None


@dataclass(frozen=True)
class Original:
    """The original as plain transformers runs it on torch, in ``dtype``: figures of speed and memory, named as an artifact's."""

    dtype: str
    figures: dict[str, Figure]

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"original (torch, {self.dtype})"


@dataclass(frozen=True)
class Comparison:
    """``artifact`` against ``than`` in one figure: their ratio, with an interval (of confidence ``level``) from two rounds on."""

    artifact: str
    than: str
    figure: str
    ratio: float
    rounds: int
    verdict: str
    low: float | None = None
    high: float | None = None
    level: float | None = None


@dataclass(frozen=True)
class Cpu:
    """flags: of its vector instructions, None where the system does not list them."""

    model: str
    flags: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a resumed measurement must find unchanged; ``versions`` of packages, ``gpus`` only where one is used."""

    system: str
    python: str
    cpu: Cpu
    cores: int
    versions: dict[str, str]
    gpus: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Environment(Machine):
    """The machine, and what is particular to one run; ``load_average`` is that of the minute before."""

    date: str
    command: str
    threads: int | str
    provider: str
    load_average: float | None = None


@dataclass(frozen=True)
class Report:
    """All that was measured of one artifact.

    identity: hash of its files. figures: by flat dotted name. missing: figure -> why it could not be measured.
    failed: kind of measurement -> how its process died. run: shared by artifacts that were measured in interleaved rounds.
    forecast: what was expected before it was made, where a build planned it. original: measured in the same run. text: name of
    the file that quality was measured on.
    """

    artifact: str
    identity: str
    steps: tuple[Step, ...]
    figures: dict[str, Figure]
    stages: tuple[StageRow, ...]
    missing: dict[str, str]
    failed: dict[str, str]
    environment: Environment
    run: str
    answers: tuple[Answer, ...] = ()
    forecast: Forecast | None = None
    original: Original | None = None
    text: str = ""

    def __post_init__(self) -> None:
        """Size, speed, time and memory are compared as ratios."""
        compared = [*self.figures.items(), *(self.original.figures.items() if self.original else ())]
        wrong = (name for name, figure in compared if name.startswith(_POSITIVE) and min(figure.values) <= 0)
        if (name := next(wrong, None)) is not None:
            raise ValueError(f"{name} is not above 0")
        if "size.total_bytes" not in self.figures:
            raise ValueError("size.total_bytes is missing")

    @property
    def removed_layers(self) -> list[int]:
        """Layers that its prune steps removed."""
        return [layer for step in self.steps if step.removal for layer in step.removal.removed_layers]

    @property
    def parts_removed(self) -> dict[str, int]:
        """How many layers lost each part, by ``attention`` and ``feed-forward part``."""
        counts: dict[str, int] = {}
        for step in self.steps:
            if step.removal and step.removal.removed_parts:
                part, lost = step.removal.part, len(step.removal.removed_parts)
                counts[part] = counts.get(part, 0) + lost
        return counts

    @property
    def channels_removed(self) -> float:
        """Share of the feed-forward channels that its narrow steps removed."""
        widths = [step.narrowing.width for step in self.steps if step.narrowing]
        return 1 - math.prod(after / before for before, after in widths)

    @property
    def removed(self) -> str:
        """What is gone, as ``1 layer and 25 % of the channels``; empty where nothing is."""
        count, share = len(self.removed_layers), self.channels_removed
        layers = [f"{count} layer{'s'[: count != 1]}"] if count else []
        layers += [f"{part} of {lost} layer{'s'[: lost != 1]}" for part, lost in self.parts_removed.items()]
        return " and ".join([*layers, *([f"{100 * share:.3g} % of the channels"] if share else [])])

    @property
    def quantization(self) -> Quantization:
        """Of its first quantize step."""
        return next((step.quantization for step in self.steps if step.quantization), Quantization())

    @property
    def perplexities(self) -> dict[str, float]:
        """Of each stage that was scored."""
        return {row.name: row.perplexity for row in self.stages if row.perplexity is not None and row.failed is None}

    @property
    def smaller_source(self) -> int | None:
        """Bytes of the GGUF file of few bits that it was made from, where that is smaller than it is, and has the same tokens."""
        if any(step.trimming for step in self.steps):
            return None
        sources = (step.imported for step in self.steps if step.imported and step.imported.few_bits)
        size = next((found.file_bytes for found in sources), 0)
        return size if 0 < size < self.figures["size.total_bytes"].median else None

    @property
    def growth(self) -> float | None:
        """Of the perplexity, from the original to the shipped files, a share; None where either was not scored."""
        scored = self.perplexities
        return scored["onnx"] / scored["original"] - 1 if {"onnx", "original"} <= scored.keys() else None

    def missed(self, forecast: Forecast) -> list[str]:
        """A line for each bound that it does not keep to, or that nothing measured; none of those of another machine."""
        lines = []
        lengths = [int(name.removeprefix(TTFT)) for name in self.figures if name.startswith(TTFT)]
        for bound in () if forecast.machine else forecast.bounds:
            if bound.figure not in self.figures:
                lines.append(f"nothing measured what {bound.flag} {bound.given} bounds")
            elif (excess := bound.excess(self.figures[bound.figure].median)) > 1 + NOISE:
                longer = bound.figure == MEMORY and max(lengths, default=0) > forecast.prompt
                of = f" (of prompts of up to {max(lengths)} tokens, and planned for {forecast.prompt})" if longer else ""
                lines.append(f"{self.artifact} misses {bound.flag} {bound.given} by {100 * (excess - 1):.0f} % as measured{of}")
        return lines


@dataclass(frozen=True)
class ReportFile:
    """The whole content of a report.json: one report or several, and how each compares with the first."""

    reports: tuple[Report, ...]
    comparisons: tuple[Comparison, ...] = ()

    @property
    def first(self) -> Report:
        """The artifact that the others are compared with."""
        return self.reports[0]


@dataclass(frozen=True)
class _Others:
    """The keys of a report.json that its first report does not have."""

    compared_with: tuple[Report, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


def write(content: ReportFile, file: Path) -> None:
    """Write report.json: the keys of the first report, then the others under ``compared_with``."""
    first, *others = map(_report_object, content.reports)
    comparisons = [object_of(comparison) for comparison in content.comparisons]
    write_json(file, {"schema": SCHEMA} | first | {"compared_with": others, "comparisons": comparisons})


def read(file: Path) -> ReportFile:
    """The content of a report.json. Raises InputError when it is absent, damaged, or of another schema."""
    content = read_json(file)
    if content.get("schema") != SCHEMA:
        raise InputError(f"{file} was written by another edgepress; run edgepress bench again")
    try:
        others = typed(_Others, content, "report")
        return ReportFile((typed(Report, content, "report"), *others.compared_with), others.comparisons)
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}); run edgepress bench again") from error


def for_people(content: ReportFile) -> ReportFile:
    """The same with every text in one line that prints: names come from manifests and folders that strangers wrote."""
    return replace(content, reports=_printing(content.reports), comparisons=_printing(content.comparisons))


def _printing(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _printing(getattr(value, item.name)) for item in fields(value)})
    if isinstance(value, dict):
        return {one_line(key): _printing(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_printing, value))
    return one_line(value) if isinstance(value, str) else value


def _report_object(report: Report) -> JsonObject:
    made = object_of(report) | {"figures": _figure_objects(report.figures)}
    if (original := report.original) is not None:
        made["original"] = {"dtype": original.dtype, "figures": _figure_objects(original.figures)}
    return made


def _figure_objects(figures: dict[str, Figure]) -> JsonObject:
    return {name: _figure_object(figure) for name, figure in figures.items()}


def _figure_object(figure: Figure) -> JsonObject:
    """With what readers would otherwise compute again."""
    derived = {"median": figure.median} | {f"p{q}": value for q, value in figure.percentiles.items()}
    error = {} if figure.standard_error is None else {"standard_error": figure.standard_error}
    return {"unit": figure.unit, "values": list(figure.values)} | derived | error
