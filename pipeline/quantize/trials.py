"""What bits cost a model, measured by rounding on its own blocks: the growth of its loss on texts of several kinds.

Rounding to nearest stands in for every method: it needs no calibration and a minute at most. One copy of the model is in memory,
and none while it writes a text.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
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
from edgepress.pipeline.checkpoint.weight_file import weight_file
from edgepress.pipeline.errors import InputError, ModelError, OptionError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import read_json, sha256, write_json
from edgepress.pipeline.machine import large_blocks_given_back, prefers_bfloat16, release_memory, too_large
from edgepress.pipeline.metrics.readable import readable, warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import exact_losses
from edgepress.pipeline.options import COST_TOKENS, MIXED, OWN_TOKENS, SELF, WRITTEN, QuantizeOptions
from edgepress.pipeline.own_text.kept import is_written, with_text
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.budget import COUNTING, Costs, Ends, carried, ends_of
from edgepress.pipeline.quantize.curvature import DRAWS
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS, Head, candidates, rounded_head, weights_of_tokens
from edgepress.pipeline.quantize.mix import EIGHT, FORMS, HEAD_GROUP, Form, Item, bytes_of
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.quantize.sensitivity import WINDOW, items_of_model
from edgepress.pipeline.registry import version
from edgepress.pipeline.text.windows import IDS, text_windows
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
TRIAL_TOKENS, TRIAL_WINDOW = 2048, 256
HEAD_TOKENS = 2048  # of the calibration text, which show how likely each token is


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


class Trial:
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
        self.at_least: set[str] = set()  # bits whose growth on one text settled the matter: on others it may be more
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
        self.texts.append(_Text(windows, exact_losses(self._model().blocks, windows, "bits")))

    def _all_texts(self) -> Iterator[_Text]:
        """The texts that bits are judged by, each read when first needed; technical prose only where the model reads it."""
        number = 0
        while number < len(self.judging):
            given = self.judging[number]
            if number == len(self.texts):
                try:
                    self._read(self._written(given))
                except ModelError as error:
                    if given.calibration != SELF:
                        raise
                    log.warning("warning: bits are not judged by a text of the model's own: %s", error)
                    self.judging.remove(given)
                    continue
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
        return self.options.calibration in WRITTEN and is_written(self.resolved().calibration)

    def _written(self, options: QuantizeOptions) -> QuantizeOptions:
        """With a file for a text that the model writes; while it does, no other copy of it is in memory.

        Raises ModelError where it takes too much memory, and nobody asked for that text.
        """
        if options.calibration not in WRITTEN:
            return options
        self._free()
        return with_text(options, self.path, sparing=self.options.calibration != SELF)

    def _windows(self, tokens: int, length: int, options: QuantizeOptions) -> list[np.ndarray]:
        text, key = options.calibration, options.text_key
        return text_windows(text, self.path, budget=tokens, skip=options.calibration_skip, length=length, key=key)

    def items(self) -> list[Item]:
        """What each matrix costs at each form, from one pass over the calibration text, of ``mixed`` over what is shipped."""
        mixed = self.options.calibration == MIXED
        read = with_text(self.options, self.path, shipped=True) if mixed else self.resolved()
        windows = self._windows(COST_TOKENS, min(WINDOW, self.context), read)
        model = self._model().blocks.model
        items = items_of_model(model, windows, self.spared, self.options.symmetric, spent=True)
        if weight_file(model) is None:  # else its weights are what they were
            del model
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
        self.growth.pop(bits, None)  # to come last
        self.at_least.discard(bits)
        self.growth[bits], changes = -1.0, dict[_Text, float]()
        for texts in self._in_turn() if all_texts else [self.texts[:1]]:
            model = self._model()
            with ExitStack() as forms_of_all:
                forms_of_all.enter_context(rounded(model.modules, forms, self.options.symmetric, self.weights))
                if head.rare:
                    module = model.blocks.model.get_output_embeddings()
                    forms_of_all.enter_context(rounded_head(module, head, group_size))
                for text in texts:
                    losses = exact_losses(model.blocks, text.windows, f"{bits} bits, text {len(changes) + 1}")
                    changes[text] = change = factor * float((losses - text.losses).mean())
                    self.growth[bits] = max(self.growth[bits], round(math.expm1(min(change, 50.0)), 5))
                    if self.growth[bits] > limit:
                        break
            del model
            if self.growth[bits] > limit:
                self.at_least.add(bits)
                break
        if all_texts:
            rest = [text for text in self._suffering if text not in changes]
            self._suffering = sorted(changes, key=changes.__getitem__, reverse=True) + rest
        return self.growth[bits]

    def _in_turn(self) -> Iterator[list[_Text]]:
        """All texts: first those that suffered most, one of which may settle the matter, then each that was not measured yet.

        Of those in one list none has yet to be written, for which the model would be let go of.
        """
        measured = list(self._suffering)
        yield from [measured] if measured else []
        yield from ([text] for text in self._all_texts() if text not in measured)

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
                losses = exact_losses(model.blocks, text.windows, name)
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
    # costs of weights that lie in a file are computed in float32 on any processor
    parts += [prefers_bfloat16() and not too_large(_parameters(source, options))]
    parts += [COST_TOKENS, WINDOW, DRAWS, TRIAL_TOKENS, FORMS, version("edgepress")]
    name = hashlib.sha256(repr(parts).encode()).hexdigest()
    return cache_folder() / "costs" / f"{name[:32]}.json"


def _parameters(source: Artifact, options: QuantizeOptions) -> int:
    return int(Checkpoint(source.path, options.trust_remote_code).meta_model().num_parameters())


def costs_of(source: Artifact, options: QuantizeOptions, trial: Trial | None = None) -> Costs:
    """What there is to choose from, as it was measured before, or now, by ``trial`` where there is one already.

    It is kept for every copy of the model; what is copied with it, and its manifest, are counted anew.
    """
    given = trial.resolved() if trial else with_text(_longer(options), source.path)
    kept, files = _kept(source, given, options.calibration), carried(Checkpoint(source.path, options.trust_remote_code))
    with suppress(InputError, KeyError, TypeError, ValueError):
        return Costs.from_json(read_json(kept)).beside(files)
    trial, judges = trial or Trial(source, options, given), len(_judging(options))
    with large_blocks_given_back():
        costs = trial.costs()
    if len(trial.judging) < judges and options.calibration not in WRITTEN:
        return costs  # with more memory free another text would judge, too
    with suppress(OSError, OutputError):  # measured again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, costs.beside(-files).to_json())
    return costs
