"""Which bits a model needs: tried by rounding on its own blocks, before anything is written.

Small models lose far more at 4 bits than large ones: SmolLM2-135M a third of its perplexity and more, where a 7 B model loses a few
per cent. Rounding to nearest stands in for every method in a trial: it needs no calibration and a minute at most.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks, block_linears, block_matrices
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import SCALE_BYTES
from edgepress.pipeline.checkpoint.parts import within
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import InputError, OptionError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import read_json, sha256, write_json
from edgepress.pipeline.machine import large_blocks_given_back, release_memory
from edgepress.pipeline.metrics.readable import readable, warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import exact_losses
from edgepress.pipeline.options import COST_TOKENS, MIXED, OWN_TOKENS, SELF, WRITTEN, QuantizeOptions, size_in_bytes
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.budget import COUNTING, Costs, Ends, carried, check_possible, ends_of, fit
from edgepress.pipeline.quantize.curvature import DRAWS
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS, Head, candidates, rounded_head, weights_of_tokens
from edgepress.pipeline.quantize.mix import (
    BASE,
    EIGHT,
    FORMS,
    HEAD_GROUP,
    Form,
    Item,
    by_matrix,
    bytes_of,
    mean_bits,
    rules_of,
    solve,
    usual_form,
)  # fmt: skip
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.quantize.sensitivity import WINDOW, items_of_model
from edgepress.pipeline.quantize.stage import Chosen
from edgepress.pipeline.registry import version
from edgepress.pipeline.report.steps import Import
from edgepress.pipeline.text.windows import IDS, text_windows
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
TRIAL_TOKENS, TRIAL_WINDOW = 2048, 256
HEAD_TOKENS = 2048  # of the calibration text, which show how likely each token is
# Growth of the loss under a calibrated method, in that of rounding (docs/quantization.md).
CALIBRATED = {"gptq": 0.5, "gptqmodel": 0.7}
# The same of a tune stage, where all matrices have 4 bits, and where they have as many as each needs: there is less to win back
# (docs/tuning.md).
TUNED, TUNED_MIX = 0.6, 0.9
TRIALS = 4
# A mix that saves less of the artifact's bytes than this is not worth what it costs: most of the loss that is allowed, where 8 bits
# lose next to nothing. A tune stage wins some of it back, and who asked for one wants few bytes.
WORTH, WORTH_TUNED = 0.2, 0.03
# Of the limit, what a mix may use: it is chosen by the text that it is judged by, and loses more on others.
AIM = 0.8


@dataclass(frozen=True, eq=False)
class _Text:
    """Windows of token ids, and the loss of each of their tokens with the weights as they are; equal to itself alone."""

    windows: list[np.ndarray]
    losses: np.ndarray


@dataclass(frozen=True)
class _Loaded:
    """The model's blocks, and the matrices whose bits are chosen, by name."""

    blocks: Blocks
    modules: dict[str, torch.nn.Linear | Conv1D]


class _Trial:
    """The model, its texts, and what was measured so far. growth: expected growth of perplexity (a share), by bits."""

    def __init__(self, source: Artifact, options: QuantizeOptions, resolved: QuantizeOptions | None = None) -> None:
        self.options, self.path, self.source = options, source.path, source
        self.checkpoint = Checkpoint(source.path, options.trust_remote_code)
        self.context, self.weights = self.checkpoint.context, self.checkpoint.index
        self.texts: list[_Text] = []
        self._suffering: list[_Text] = []  # what was measured last, the greatest loss first
        self.judging = _judging(options)
        self._resolved = resolved
        self.growth: dict[str, float] = {}
        self._loaded: _Loaded | None = None
        self._ends: Ends | None = None
        self._heads: dict[Head, float] | None = None
        self.spared: frozenset[str] = frozenset()
        if self.judging[0].calibration == SELF:
            self.judging[0] = self.resolved()
        model = self._model()
        if not model.modules:
            raise OptionError("there is nothing to choose: every matrix keeps the codes that it has; leave --target-bits out")
        shapes, _ = block_matrices(model.blocks.model)
        self.shapes = {name: shapes[name] for name in model.modules}
        chosen = {id(module.weight) for module in model.modules.values()}
        chosen |= {id(weight) for name, weight in model.blocks.model.named_parameters() if within(self.checkpoint.silent, name)}
        self.rest = sum(self._bytes_outside(weight) for weight in model.blocks.model.parameters() if id(weight) not in chosen)
        self._read(self.judging[0])
        self.vocabulary = int(model.blocks.model.config.vocab_size)
        warn_unless_readable(float(self.texts[0].losses.mean()), self.vocabulary, self.judging[0].calibration)

    def _model(self) -> _Loaded:
        """The model, loaded when it is first needed and again after ``_free``."""
        if self._loaded is None:
            model = self.checkpoint.model()
            linears = block_linears(model)
            self.spared = self.checkpoint.spared(linears)
            self._loaded = _Loaded(Blocks(model), {name: module for name, module in linears.items() if name not in self.spared})
        return self._loaded

    def _free(self) -> None:
        self._loaded = None
        release_memory()  # its parts refer to one another

    def _read(self, options: QuantizeOptions) -> None:
        """Judge by the calibration text of ``options`` as well."""
        windows = self._windows(TRIAL_TOKENS, min(TRIAL_WINDOW, self.context), options)
        self.texts.append(_Text(windows, exact_losses(self._model().blocks, progress(windows, "bits", "window"))))

    def _all_texts(self) -> Iterator[_Text]:
        """The texts that bits are judged by, each read when first needed; technical prose only where the model reads it."""
        number = 0
        while number < len(self.judging):
            given = self.judging[number]
            if given.calibration == SELF and self.options.calibration == MIXED and not self.writes():
                self.judging.remove(given)  # the model makes no text: nothing is judged by it either
                continue
            if number == len(self.texts):
                self._read(self._written(given))
            text = self.texts[number]
            if given.calibration != OTHER_TEXT or readable(float(text.losses.mean()), self.vocabulary):
                yield text
            number += 1

    def resolved(self) -> QuantizeOptions:
        """The options with a file for the calibration text, long enough for all that is measured."""
        if self._resolved is None:
            self._resolved = self._written(_longer(self.options))
        return self._resolved

    def writes(self) -> bool:
        """Whether the calibration text is, in part at least, the model's own."""
        return self.options.calibration in WRITTEN and self.resolved().calibration.name.endswith(IDS)

    def _written(self, options: QuantizeOptions) -> QuantizeOptions:
        """With a file for a text that the model writes; while it does, no other copy of it is in memory."""
        if options.calibration not in WRITTEN:
            return options
        self._free()
        return with_text(options, self.path)

    def _windows(self, tokens: int, length: int, options: QuantizeOptions) -> list[np.ndarray]:
        text, key = options.calibration, options.text_key
        return text_windows(text, self.path, budget=tokens, skip=options.calibration_skip, length=length, key=key)

    def items(self) -> list[Item]:
        """What each matrix costs at each form, from one pass over the calibration text."""
        windows = self._windows(COST_TOKENS, min(WINDOW, self.context), self.resolved())
        items = items_of_model(self._model().blocks.model, windows, self.spared, self.options.symmetric, spent=True)
        self._free()
        return items

    def measure(
        self,
        bits: str,
        forms: Mapping[str, Form],
        factor: float,
        limit: float = math.inf,
        all_texts: bool = True,
        head: Head = EIGHT_BITS,
        group_size: int = HEAD_GROUP,
    ) -> float:
        """The expected growth of perplexity with the matrices in these forms, on the text that suffers most.

        factor: of a loss, what is left of rounding's. limit: a text that exceeds it settles the matter. all_texts: judge by all,
        not by the calibration text alone. head: in this form and in such groups, where it has rare rows.
        """
        self.growth[bits], changes = -1.0, dict[_Text, float]()
        for number, text in enumerate(self._in_turn() if all_texts else self.texts[:1]):
            model = self._model()
            with ExitStack() as forms_of_all:
                forms_of_all.enter_context(rounded(model.modules, forms, self.options.symmetric, self.weights))
                if head.rare:
                    module = model.blocks.model.get_output_embeddings()
                    forms_of_all.enter_context(rounded_head(module, head, group_size))
                losses = exact_losses(model.blocks, progress(text.windows, f"{bits} bits, text {number + 1}", "window"))
            del model
            changes[text] = change = factor * float((losses - text.losses).mean())
            self.growth[bits] = max(self.growth[bits], round(math.expm1(min(change, 50.0)), 5))
            if self.growth[bits] > limit:
                break
        if all_texts:
            rest = [text for text in self._suffering if text not in changes]
            self._suffering = sorted(changes, key=changes.__getitem__, reverse=True) + rest
        return self.growth[bits]

    def _in_turn(self) -> Iterator[_Text]:
        """All texts: first those that suffered most, one of which may settle the matter, then those that were not measured yet."""
        measured = list(self._suffering)
        yield from measured
        yield from (text for text in self._all_texts() if text not in measured)

    def costs(self) -> Costs:
        """What there is to choose from, measured now."""
        heads = self.heads() | {FOUR_BITS: self._head_cost(FOUR_BITS)}
        return Costs(tuple(self.items()), self.ends(), heads)

    def ends(self) -> Ends:
        """What is not chosen matrix by matrix."""
        if self._ends is None:
            self._ends = ends_of(self.checkpoint, self._model().blocks.model, list(self.shapes))
        return self._ends

    def heads(self) -> dict[Head, float]:
        """What heads cost, nats a token: one of 8 bits nothing, and those with few bits for rare tokens, fewest bytes first.

        The first of them is measured; the others cost less as the weights of their rare rows are less. None has rare rows where the
        head's bits are given, only whole rows have a scale, or gptqmodel quantizes, which would leave the head to rounding.
        """
        if self._heads is None:
            options, self._heads = self.options, {EIGHT_BITS: 0.0}
            given = options.head_bits != EIGHT.bits or options.rare_rows or options.embedding_bits is not None
            by_row = options.group <= 0 and options.max_size is None
            if not (given or by_row or options.method == "gptqmodel") and self.ends().vocabulary:
                windows = self._windows(HEAD_TOKENS, min(TRIAL_WINDOW, self.context), self.resolved())
                found = candidates(weights_of_tokens(self._model().blocks, progress(windows, "rare tokens", "window")))
                found = {head: share for head, share in found.items() if self.saved_by_head(head) > 0}
                for first, largest in list(found.items())[:1]:
                    cost = self._head_cost(first)
                    self._heads = {head: cost * share / largest for head, share in found.items()} | self._heads
        return self._heads

    def _head_cost(self, head: Head) -> float:
        """How the loss grows with this head, nats a token, mean of all texts; a tied embedding has its bits, too."""
        changes = []
        for number, text in enumerate(self._all_texts()):
            model = self._model()
            with rounded_head(model.blocks.model.get_output_embeddings(), head, HEAD_GROUP):
                name = f"head of {head.mean_bits(self.ends().vocabulary):.2g} bits, text {number + 1}"
                losses = exact_losses(model.blocks, progress(text.windows, name, "window"))
            del model  # the next text may be one that another copy of it writes
            changes.append(float((losses - text.losses).mean()))
        return max(0.0, float(np.mean(changes)))

    def all(self, form: Form) -> dict[str, Form]:
        """Every matrix in one form."""
        return dict.fromkeys(self.shapes, form)

    def saved(self, forms: Mapping[str, Form], head: Head = EIGHT_BITS) -> float:
        """The share of the artifact's bytes that these forms save against 8 bits in all blocks, and those of the head."""
        size, eight = self._bytes(forms), self._bytes(self.all(EIGHT))
        return (eight - size + self.saved_by_head(head)) / (eight + self.rest)

    def saved_by_head(self, head: Head) -> int:
        """Bytes that its rare rows save."""
        ends = self.ends()
        return ends.bytes(EIGHT_BITS, HEAD_GROUP) - ends.bytes(head, HEAD_GROUP) if head.rare else 0

    def _bytes(self, forms: Mapping[str, Form]) -> int:
        return sum(bytes_of(*shape, forms[name], self.options.symmetric) for name, shape in self.shapes.items())

    def _bytes_outside(self, weight: torch.nn.Parameter) -> float:
        """Of what is not chosen here: the head and the embedding at the bits of the head, all else in float32."""
        bits = self.options.head_bits if weight.ndim == 2 else 16
        return weight.numel() * (4 if bits == 16 else (bits + 8 * SCALE_BYTES / HEAD_GROUP) / 8)


def _longer(options: QuantizeOptions) -> QuantizeOptions:
    """With as many calibration tokens as all that is measured takes."""
    return replace(options, calibration_tokens=max(options.calibration_tokens, COST_TOKENS))


def _judging(options: QuantizeOptions) -> list[QuantizeOptions]:
    """The texts that bits are judged by, as options that name them: the calibration text and what the model writes.

    Bits that suit one may lose twice as much of another. Where no text is given, the shipped prose and technical prose judge, too.
    """
    tokens = OWN_TOKENS if options.calibration == MIXED else 2 * TRIAL_TOKENS  # one text serves to calibrate and to judge
    own = replace(options, calibration=SELF, calibration_tokens=tokens, calibration_skip=0)
    if options.calibration in WRITTEN:
        prose, technical = (replace(own, calibration=text, calibration_model=None) for text in (CALIBRATION_TEXT, OTHER_TEXT))
        return [prose, own, technical] if options.calibration == MIXED else [_longer(options), prose, technical]
    return [options] if options.calibration.name.endswith(IDS) else [options, own]


def _kept(source: Artifact, options: QuantizeOptions, asked: Path) -> Path:
    """The file that keeps the costs, by what decides them: the weights, and the text; asked: as it was asked for, by which the
    texts that judge a head are chosen.
    """
    parts = [source.model_identity(), sha256(options.calibration), options.calibration_skip, options.text_key, options.symmetric]
    parts += [options.calibration_seed, options.head_bits, options.rare_rows, options.embedding_bits, options.method == "gptqmodel"]
    parts += [options.trust_remote_code, COUNTING, str(asked) if asked in WRITTEN else ""]
    name = hashlib.sha256(
        repr([*parts, COST_TOKENS, WINDOW, DRAWS, TRIAL_TOKENS, FORMS, version("edgepress")]).encode()
    ).hexdigest()
    return cache_folder() / "costs" / f"{name[:32]}.json"


def costs_of(source: Artifact, options: QuantizeOptions, trial: _Trial | None = None) -> Costs:
    """What there is to choose from, as it was measured before, or now, by ``trial`` where there is one already.

    It is kept for every copy of the model; what is copied with it, and its manifest, are counted anew.
    """
    given = trial.resolved() if trial else with_text(_longer(options), source.path)
    kept, files = _kept(source, given, options.calibration), carried(Checkpoint(source.path, options.trust_remote_code))
    with suppress(InputError, KeyError, TypeError, ValueError):
        return Costs.from_json(read_json(kept)).beside(files)
    with large_blocks_given_back():
        costs = (trial or _Trial(source, options, given)).costs()
    with suppress(OSError, OutputError):  # measured again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, costs.beside(-files).to_json())
    return costs


def choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    """Options that settle the bits of every matrix: by ``max_growth``, ``target_bits`` or ``max_size``.

    Measured on the calibration text, of which rounding learns nothing, and on other kinds of text (``_judging``).
    """
    with large_blocks_given_back():  # the weights themselves are such blocks: halved for ``items``, dropped by ``_free``
        return _choose(source, options)


def _choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    if options.max_size is not None:
        check_possible(source.path, options, None)
    trial = _Trial(source, options)
    given = options.target_bits is not None or options.max_size is not None
    before = quantized_before(source) and not given and not trial.writes()
    settled = replace(options, max_growth=None, target_bits=None, max_size=None)
    if before:
        settled = _by_rounding(settled)
        if options.method in CALIBRATED:
            log.info(
                "quantize: rounded to nearest: on weights that were quantized before, GPTQ wins only on the kind of text that it "
                "read; --calibration mixed has two"
            )
    left = left_of(settled)
    left_of_uniform = left * TUNED / TUNED_MIX if options.tuned else left
    if options.max_size is not None:
        return _in_bytes(trial, settled, size_in_bytes(options.max_size, "--max-size"))
    if options.target_bits is not None:
        items = trial.items()
        size = options.target_bits * sum(item.weights for item in items) / 8
        forms = solve(items, FORMS, size=size)
        growth = trial.measure(f"{mean_bits(items, forms):.2f}", by_matrix(items, forms), left, all_texts=options.tuned)
        because = (
            f"{mean_bits(items, forms):.2f} bits a weight of {options.target_bits:g} asked for; expected {100 * growth:+.1f} %"
        )
        return Chosen(_mixed(settled, items, forms), f"{because} of perplexity", trial.growth)
    limit = options.max_growth or 0.0
    uniform = Form(options.weight_bits, options.group)
    if trial.measure(str(uniform.bits), trial.all(uniform), left_of_uniform, limit) <= limit:
        chosen = replace(settled, bits=uniform.bits, group_size=uniform.group_size)
        room = math.log1p(AIM * limit) - math.log1p(trial.growth[str(uniform.bits)])
        for head in [head for head, cost in _heads(trial).items() if head.rare and left_of_uniform * cost <= room]:
            name, group = _named(str(uniform.bits), head, trial), uniform.group_size
            if trial.measure(name, trial.all(uniform), left_of_uniform, limit, head=head, group_size=group) <= AIM * limit:
                return Chosen(replace(chosen, rare_rows=head.rare), _because(trial.growth, limit, name), trial.growth)
        return Chosen(chosen, _because(trial.growth, limit, str(uniform.bits)), trial.growth)
    eight = replace(_by_rounding(settled), bits=EIGHT.bits, group_size=EIGHT.group_size)  # calibration wins nothing there
    worth = WORTH_TUNED if options.tuned else WORTH
    most = trial.saved(trial.all(Form(4, 64)), next(iter(_heads(trial))))
    if trial.measure("8", trial.all(EIGHT), 1.0, all_texts=False) > limit or most < worth:
        return Chosen(eight, _because(trial.growth, limit, "8"), trial.growth)
    items = trial.items()
    mixed = _within(trial, items, limit if options.tuned else AIM * limit, left, worth)
    if mixed is None:
        return Chosen(eight, _because(trial.growth, limit, "8"), trial.growth)
    chosen = replace(_mixed(settled, items, mixed.forms), rare_rows=mixed.head.rare)
    return Chosen(chosen, _because(trial.growth, limit, mixed.name), trial.growth)


def left_of(options: QuantizeOptions, forms: Iterable[Form] = ()) -> float:
    """Of the loss that rounding a mix costs, what the method and a tune stage leave; all of what 8 bits everywhere cost."""
    if set(forms) == {EIGHT}:
        return 1.0
    return CALIBRATED.get(options.method, 1.0) * (TUNED_MIX if options.tuned else 1.0)


def left_of_head(options: QuantizeOptions, head: Head) -> float:
    """The same of a head, which is rounded at 8 bits, and by gptqmodel in any case."""
    if options.method == "gptqmodel" or head == EIGHT_BITS:
        return 1.0
    return left_of(replace(options, tuned=False) if head.rare else options)  # a tune stage does not train rare rows


def _in_bytes(trial: _Trial, settled: QuantizeOptions, size: int) -> Chosen:
    """The least loss in an artifact of at most ``size`` bytes. Raises OptionError where none is so small."""
    costs = costs_of(trial.source, trial.options, trial)
    items, found = costs.items, fit(costs, size)
    mixed, bits = by_matrix(items, found.forms), mean_bits(items, found.forms)
    growth = trial.measure(f"{bits:.2f}", mixed, left_of(settled, found.forms), all_texts=settled.tuned)
    head = left_of_head(settled, found.head) * costs.head[found.head]
    growth, of_head = round(math.expm1(math.log1p(growth) + head), 5), found.head.mean_bits(costs.ends.vocabulary)
    # where all have 8 bits there is nothing that calibration would win
    rounds = set(found.forms) == {EIGHT} and left_of_head(settled, found.head) == 1.0
    chosen = _mixed(_by_rounding(settled) if rounds else settled, items, found.forms)
    because = (
        f"{found.size / 1e6:.1f} MB of {size / 1e6:g} MB: {bits:.2f} bits a weight, {of_head:.2g} in the head; expected "
        f"{100 * growth:+.1f} % of perplexity"
    )
    return Chosen(replace(chosen, head_bits=found.head.bits, rare_rows=found.head.rare), because, trial.growth)


@dataclass(frozen=True)
class _Mix:
    """A form for each item, a head, and what the two are called."""

    forms: list[Form]
    head: Head
    name: str


def _within(trial: _Trial, items: list[Item], limit: float, left: float, worth: float) -> _Mix | None:
    """The mix of fewest bytes whose measured growth keeps to the limit; None where it saves too little against 8 bits.

    The estimates need not add up: a bound that a trial exceeds is lowered by as much.
    """
    allowed = math.log1p(limit) / left
    for _ in range(TRIALS):
        found = [
            (forms, head)
            for head, cost in _heads(trial).items()
            if cost < allowed and (forms := solve(items, (Form(4, 32), BASE, EIGHT), cost=allowed - cost))
        ]
        forms, head = max(found, key=lambda pair: trial.saved(by_matrix(items, pair[0]), pair[1]))
        if trial.saved(by_matrix(items, forms), head) < worth:
            return None
        name = _named(f"{mean_bits(items, forms):.1f}", head, trial)
        of_method = 1.0 if set(forms) == {EIGHT} else left  # calibration wins nothing there
        growth = trial.measure(name, by_matrix(items, forms), of_method, limit, head=head)
        if growth <= limit:
            return _Mix(forms, head, name)
        allowed *= 0.95 * math.log1p(limit) / math.log1p(growth)
    return None


def _heads(trial: _Trial) -> dict[Head, float]:
    """The heads to choose from and what they cost: before a tune stage, which does not train the scales of rare rows, one."""
    return {EIGHT_BITS: 0.0} if trial.options.tuned else trial.heads()


def _named(bits: str, head: Head, trial: _Trial) -> str:
    """Bits of the blocks' matrices, and of the head where it has rare rows: what a growth is of."""
    return f"{bits} (head {head.mean_bits(trial.ends().vocabulary):.1f})" if head.rare else bits


def _by_rounding(options: QuantizeOptions) -> QuantizeOptions:
    return replace(options, method="rtn", act_order=False)


def _mixed(settled: QuantizeOptions, items: Sequence[Item], forms: list[Form]) -> QuantizeOptions:
    usual = usual_form(forms, items)
    rules = rules_of(by_matrix(items, forms), usual)
    return replace(settled, bits=usual.bits, group_size=usual.group_size, bits_for=rules)


def quantized_before(source: Artifact) -> bool:
    """Whether the checkpoint came from a GGUF file that holds weights in fewer than 8 bits."""
    return any(typed(Import, step.facts, "import").few_bits for step in source.steps[:1] if step.stage == "import")


def _because(growth: dict[str, float], limit: float, taken: str) -> str:
    figures = [f"{bits} bits {100 * share:+.1f} % of perplexity" for bits, share in growth.items()]
    within = "" if growth[taken] <= limit else ", which nothing here keeps to"
    return f"expected: {', '.join(figures)}; {100 * limit:g} % is allowed (--max-growth){within}"
