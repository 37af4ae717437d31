"""The stages behind an artifact as its manifest records them, and what the report reads from each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from edgepress.pipeline.documents import typed
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.vocabulary import PARTS

_MOST_LAYERS = 1 << 16


@dataclass(frozen=True)
class HealMethod:
    """One method of healing, and whether its result was kept."""

    method: str
    accepted: bool


@dataclass(frozen=True)
class Healing:
    """why: the reason that nothing was tried."""

    methods: tuple[HealMethod, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class Tuning:
    """Training of scales, norms and biases; why: the reason that nothing was tried."""

    accepted: bool
    tokens: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Import:
    """Bytes of a GGUF file, and its types that are no floats."""

    file_bytes: int = 0
    quantized_types: tuple[str, ...] = ()

    @property
    def few_bits(self) -> bool:
        """Whether some of its weights have fewer than 8 bits."""
        return any(not name.startswith("Q8") for name in self.quantized_types)


@dataclass(frozen=True)
class Trimming:
    """Tokens kept: ``vocabulary`` is their number before and after, ``bits_per_byte`` of a text that judged."""

    vocabulary: tuple[int, int]
    bits_per_byte: tuple[float, float]


@dataclass(frozen=True)
class Narrowing:
    """Feed-forward channels of a block before and after; refit: whether the others made up for what went."""

    width: tuple[int, int]
    refit: bool = True


@dataclass(frozen=True)
class Removal:
    """Layers removed, by index; ``layers`` is their number before and after; ``influences`` Block Influence by layer.

    removed_parts: layers that lost a part, attention or the feed-forward one; parts: which.
    """

    removed_layers: tuple[int, ...]
    layers: tuple[int, ...]
    criterion: str = "bi"
    influences: tuple[float, ...] = ()
    parts: str = "blocks"
    removed_parts: tuple[int, ...] = ()

    @property
    def gone(self) -> tuple[int, ...]:
        """Layers that went, or lost a part."""
        return self.removed_layers or self.removed_parts

    @property
    def what(self) -> str:
        """``layers``, ``attention of layers`` or ``feed-forward part of layers``."""
        return f"{self.part and f'{self.part} of '}layer{'s'[: len(self.gone) != 1]}"

    @property
    def part(self) -> str:
        """``attention``, ``feed-forward part``, or empty for whole layers."""
        return PARTS[self.parts]

    def __post_init__(self) -> None:
        if len(self.layers) != 2 or not all(0 <= count <= _MOST_LAYERS for count in self.layers):
            raise ValueError("layers are not their number before and after")
        if self.parts not in PARTS:
            raise ValueError("parts of a kind that nobody knows")


@dataclass(frozen=True)
class Quantization:
    """The options that decide the format of the weights; the default is a model that was never quantized.

    kept_codes: how many matrices kept the codes of their GGUF file, whatever the options say. rare_rows: rows of the head that
    have 4 bits, and all of them. bits_per_weight: of all quantized matrices, scales counted; 0 where it is not known.
    """

    method: str = "none"
    bits: int = 0
    group_size: int = 0
    head_bits: int = 0
    symmetric: bool = False
    bits_for: tuple[str, ...] = ()
    kept_codes: int = 0
    rare_rows: tuple[int, ...] = ()
    bits_per_weight: float = field(default=0.0, compare=False)  # a pruned model in the same form has other bits

    def __post_init__(self) -> None:
        if self.rare_rows and (len(self.rare_rows) != 2 or not 0 < self.rare_rows[0] <= self.rare_rows[1]):
            raise ValueError("rare rows are not some of all")
        if not 0 <= self.bits_per_weight < 64:
            raise ValueError("bits of a weight are not from 0 to 64")

    @property
    def series(self) -> str:
        """Artifacts of one kind in a plot: the method's label, as ``gptq 4 bits/128``, or ``gptq, mixed``."""
        row = METHODS.get(self.method)
        group = "row" if self.group_size == -1 else self.group_size
        label = self.method if row is None else row.label.format(bits=self.bits, group_size=group)
        label = f"{self.method}, mixed" if self.bits_for else label
        return f"GGUF's codes, rest {label}" if self.kept_codes else label

    @property
    def label(self) -> str:
        """Its name in tables: a mix has the bits of all quantized weights together, as ``gptq, mixed, 5.4 bits a weight``."""
        mean = f", {self.bits_per_weight:.1f} bits a weight" if self.bits_for and self.bits_per_weight else ""
        return self.series + mean


@dataclass(frozen=True)
class Export:
    """not_fused_because: why the portable graph was taken. exact_layers: matrices that keep float activations."""

    exporter: str
    accuracy_level: int
    not_fused_because: str | None = None
    exact_layers: tuple[str, ...] = ()
    cache: str = "float"
    target: str = "cpu"


@dataclass(frozen=True)
class _Head:
    """Bits of each quantized matrix of the head, or a word for a float one."""

    head: str | dict[str, int] = "float"


@dataclass(frozen=True)
class Step:
    """One stage: its options and facts as the manifest has them. Raises ValueError for facts that are damaged."""

    stage: str
    options: JsonObject = field(default_factory=dict)
    facts: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.imported, self.trimming, self.removal, self.healing, self.narrowing
        _ = self.quantization, self.head, self.tuning, self.export

    @cached_property
    def imported(self) -> Import | None:
        """Of an import step."""
        return typed(Import, self.facts, "import") if self.stage == "import" else None

    @cached_property
    def trimming(self) -> Trimming | None:
        """Of a trim step."""
        return typed(Trimming, self.facts, "trim") if self.stage == "trim" else None

    @cached_property
    def removal(self) -> Removal | None:
        """Of a prune step."""
        return typed(Removal, self.facts, "prune") if self.stage == "prune" else None

    @cached_property
    def healing(self) -> Healing | None:
        """Of a heal step."""
        return typed(Healing, self.facts, "heal") if self.stage == "heal" else None

    @cached_property
    def narrowing(self) -> Narrowing | None:
        """Of a narrow step."""
        return typed(Narrowing, self.facts, "narrow") if self.stage == "narrow" else None

    @cached_property
    def quantization(self) -> Quantization | None:
        """Of a quantize step."""
        options = self.options | self.facts.get("chosen", {})  # with --max-growth, the stage settles them
        options = options | {
            name: self.facts[name] for name in ("kept_codes", "rare_rows", "bits_per_weight") if name in self.facts
        }
        return typed(Quantization, options, "quantize") if self.stage == "quantize" else None

    @cached_property
    def head(self) -> int | None:
        """Bits of the head after a quantize step; None where it is float."""
        head = typed(_Head, self.facts, "quantize").head if self.stage == "quantize" else "float"
        return next(iter(head.values()), None) if isinstance(head, dict) else None

    @cached_property
    def tuning(self) -> Tuning | None:
        """Of a tune step."""
        return typed(Tuning, self.facts, "tune") if self.stage == "tune" else None

    @cached_property
    def export(self) -> Export | None:
        """Of an export step."""
        return typed(Export, self.facts, "export") if self.stage == "export" else None


CHOSEN = {
    "healed": "chosen greedily by KL divergence after healing, among those of low Block Influence",
    "greedy": "chosen greedily by KL divergence among those of low Block Influence",
    "bi": "lowest Block Influence",
    "angular": "lowest angular distance",
    "list": "as given",
}


def describe(step: Step) -> str:
    """What a stage did, in one line."""
    if step.imported and step.imported.file_bytes:
        return f"import: a GGUF file of {step.imported.file_bytes / 1e6:.1f} MB, dequantized"
    if step.trimming:
        (rows, kept), (before, after) = step.trimming.vocabulary, step.trimming.bits_per_byte
        return f"trim: {kept:,} of {rows:,} tokens kept, bits a byte {before:.4f} -> {after:.4f} in float"
    if step.removal:
        gone, chosen = step.removal.gone, CHOSEN.get(step.removal.criterion, step.removal.criterion)
        part = step.removal.part and f"{step.removal.part} of "
        if not gone:
            return f"prune: {part}none of {step.removal.layers[0]} layers removed"
        named = f"number{'s'[: len(gone) != 1]} {', '.join(map(str, gone))}"
        return f"prune: {part}{len(gone)} of {step.removal.layers[0]} layers removed, {named} ({chosen})"
    if step.healing:
        return _healed(step.healing)
    if step.narrowing:
        before, after = step.narrowing.width
        plain = "" if step.narrowing.refit else ", not refitted"
        return f"narrow: {after:,} of {before:,} feed-forward channels kept in every block{plain}"
    if step.quantization:
        return _quantized(step.quantization, step.head)
    if step.tuning:
        return _tuned(step.tuning)
    if step.export:
        made = step.export
        because = f" ({made.not_fused_because})" if made.not_fused_because else ""
        exact = f" but for {len(made.exact_layers)} matrices at 0" if made.exact_layers else ""
        cache = "" if made.cache == "float" else f", cache of {made.cache}"
        level = f"accuracy level {made.accuracy_level}, {'int8' if made.accuracy_level == 4 else 'float'} activations"
        return f"export: {made.exporter} graph{because}, {level}{exact}{cache}"
    return step.stage


def _quantized(made: Quantization, head: int | None) -> str:
    row = METHODS.get(made.method)
    if row is not None and row.run is None:
        return f"quantize: {made.method}"
    symmetry = "symmetric" if made.symmetric else "asymmetric"
    groups = "one scale a row" if made.group_size == -1 else f"groups of {made.group_size}"
    bits = f"{made.bits} bits, {groups}"
    if made.bits_for:  # what most matrices have says little of a mix
        bits = f"a mix of {made.bits_per_weight:.1f} bits a weight" if made.bits_per_weight else f"{bits}, others for some matrices"
    details = f", {bits}, {symmetry}" if row is not None and row.adjustable else ""
    kept = f"{made.kept_codes} matrices keep the codes of the GGUF file; the rest: " if made.kept_codes else ""
    ends = "float" if head is None else f"{head} bits"
    if made.rare_rows:
        few, rows = made.rare_rows
        ends += f", 4 for {100 * few / rows:.0f} % of the tokens"
    return f"quantize: {kept}{made.method}{details}; head {ends}"


def _tuned(made: Tuning) -> str:
    if made.why is not None:
        return f"tune: unchanged, {made.why}"
    if not made.accepted:
        return "tune: unchanged, the KL divergence did not fall on both texts"
    return f"tune: scales, norms and biases trained on {made.tokens} tokens towards the original's predictions"


def _healed(made: Healing) -> str:
    if made.why is not None:
        return f"heal: unchanged, {made.why}"
    accepted = [method.method for method in made.methods if method.accepted]
    return f"heal: {' and '.join(accepted)}" if accepted else "heal: unchanged, no method improved perplexity on both texts"
