"""Which bits a model needs: tried by rounding on its own blocks, before anything is written.

Small models lose far more at 4 bits than large ones: SmolLM2-135M a third of its perplexity and more, where a 7 B model loses a few
per cent. Rounding to nearest stands in for every method in a trial: it needs no calibration and a minute at most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks, block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import exact_losses
from edgepress.pipeline.options import PRUNE_TOKENS, SELF, QuantizeOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.mix import (
    BASE,
    EIGHT,
    FORMS,
    Form,
    Item,
    by_matrix,
    mean_bits,
    most_common,
    rules_of,
    solve,
)  # fmt: skip
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.quantize.sensitivity import WINDOW, items_of_model
from edgepress.pipeline.quantize.stage import Chosen
from edgepress.pipeline.text.windows import IDS, text_windows

log = logging.getLogger("edgepress")
TRIAL_TOKENS, TRIAL_WINDOW = 2048, 256
COST_TOKENS = 16384
# Growth of the loss under a calibrated method, in that of rounding: 0.42 to 0.52 on the models of docs/quantization.md, whose
# weights lie on no grid; of weights that were quantized before, GPTQ may lose as much as rounding.
CALIBRATED = 0.7
# The same of a tune stage, where all matrices have 4 bits, and where they have as many as each needs: there is less to win back
# (docs/tuning.md).
TUNED, TUNED_MIX = 0.6, 0.9
TRIALS = 4
# A mix that saves less of the bytes than this is not worth its many operators.
WORTH = 0.03


class _Trial:
    """The model, its text, and what was measured so far. growth: expected growth of perplexity (a share), by bits."""

    def __init__(self, source: Artifact, options: QuantizeOptions) -> None:
        enough = replace(options, calibration_tokens=max(options.calibration_tokens, COST_TOKENS))  # a model may write it
        options = with_text(enough, source.path)
        checkpoint = Checkpoint(source.path, options.trust_remote_code)
        self.model, self.options, self.path = checkpoint.model(), options, source.path
        self.blocks, self.weights = Blocks(self.model), checkpoint.index
        self.texts = [self._windows(TRIAL_TOKENS, min(TRIAL_WINDOW, checkpoint.context), one) for one in self._kinds()]
        self.losses = [exact_losses(self.blocks, progress(windows, "bits", "window")) for windows in self.texts]
        warn_unless_readable(float(self.losses[0].mean()), self.model.config.vocab_size, options.calibration)
        self.kept = checkpoint.weights.matrices  # codes of a GGUF file
        self.modules = {name: module for name, module in block_linears(self.model).items() if name not in self.kept}
        if not self.modules:
            raise OptionError("there is nothing to choose: every matrix keeps the codes that it has; leave --target-bits out")
        self.context = checkpoint.context
        self.growth: dict[str, float] = {}

    def _kinds(self) -> list[QuantizeOptions]:
        """Options with each kind of text that is judged by: a mix that suits one may lose twice as much of another."""
        if not self.options.tuned or self.options.calibration.suffix == IDS:
            return [self.options]
        own = replace(
            self.options, calibration=SELF, calibration_tokens=PRUNE_TOKENS, calibration_skip=0
        )  # what tune reads, too, if no layer was removed
        return [self.options, with_text(own, self.path)]

    def _windows(self, tokens: int, length: int, options: QuantizeOptions) -> list[np.ndarray]:
        text, key = options.calibration, options.text_key
        return text_windows(text, self.path, budget=tokens, skip=options.calibration_skip, length=length, key=key)

    def items(self) -> list[Item]:
        """What each matrix costs at each form, from one pass over the calibration text."""
        windows = self._windows(COST_TOKENS, min(WINDOW, self.context), self.options)
        return items_of_model(self.model, windows, self.kept, self.options.symmetric)

    def measure(self, bits: str, forms: Mapping[str, Form], factor: float) -> float:
        """The expected growth of perplexity with the matrices in these forms, on the text that suffers most.

        factor: of a loss, what is left of rounding's.
        """
        with rounded(self.modules, forms, self.options.symmetric, self.weights):
            losses = [exact_losses(self.blocks, progress(windows, f"{bits} bits", "window")) for windows in self.texts]
        change = max(float((new - old).mean()) for new, old in zip(losses, self.losses, strict=True))
        self.growth[bits] = round(math.expm1(min(factor * change, 50.0)), 5)
        return self.growth[bits]

    def all(self, form: Form) -> dict[str, Form]:
        """Every matrix in one form."""
        return dict.fromkeys(self.modules, form)


def choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    """Options that settle the bits of every matrix: by ``max_growth`` or ``target_bits``.

    Measured on the calibration text, of which rounding learns nothing.
    """
    trial = _Trial(source, options)
    calibrated = options.method == "gptq" and not _quantized_before(source)
    left = CALIBRATED if calibrated else 1.0
    left_of_uniform, left = (left * TUNED, left * TUNED_MIX) if options.tuned else (left, left)
    settled = replace(options, max_growth=None, target_bits=None)
    if options.target_bits is not None:
        items = trial.items()
        size = options.target_bits * sum(item.weights for item in items) / 8
        forms = solve(items, FORMS, size=size)
        growth = trial.measure(f"{mean_bits(items, forms):.2f}", by_matrix(items, forms), left)
        because = (
            f"{mean_bits(items, forms):.2f} bits a weight of {options.target_bits:g} asked for; expected {100 * growth:+.1f} %"
        )
        return Chosen(_mixed(settled, items, forms), f"{because} of perplexity", trial.growth)
    limit = options.max_growth or 0.0
    uniform = Form(options.weight_bits, options.group)
    if trial.measure(str(uniform.bits), trial.all(uniform), left_of_uniform) <= limit:
        chosen = replace(settled, bits=uniform.bits, group_size=uniform.group_size)
        return Chosen(chosen, _because(trial.growth, limit), trial.growth)
    # calibration wins nothing there
    eight = replace(settled, method="rtn", bits=EIGHT.bits, group_size=EIGHT.group_size, act_order=False)
    # A mix that just keeps to the limit on this text may lose twice as much on another: only a tune stage makes room for it.
    if trial.measure("8", trial.all(EIGHT), 1.0) > limit or not options.tuned:
        return Chosen(eight, _because(trial.growth, limit), trial.growth)
    items = trial.items()
    mixed = _within(trial, items, limit, left)
    chosen = eight if mixed is None else _mixed(settled, items, mixed)
    return Chosen(chosen, _because(trial.growth, limit), trial.growth)


def _within(trial: _Trial, items: list[Item], limit: float, left: float) -> list[Form] | None:
    """The mix of fewest bytes whose measured growth keeps to the limit; None where it saves too little against 8 bits.

    The estimates need not add up: a bound that a trial exceeds is lowered by as much.
    """
    whole = sum(item.bytes[EIGHT] for item in items)
    allowed = math.log1p(limit) / left
    for _ in range(TRIALS):
        forms = solve(items, (Form(4, 32), BASE, EIGHT), cost=allowed)
        size = sum(item.bytes[form] for item, form in zip(items, forms, strict=True))
        if size > (1 - WORTH) * whole:
            return None
        growth = trial.measure(f"{mean_bits(items, forms):.1f}", by_matrix(items, forms), left)
        if growth <= limit:
            return forms
        allowed *= 0.95 * math.log1p(limit) / math.log1p(growth)
    return None


def _mixed(settled: QuantizeOptions, items: list[Item], forms: list[Form]) -> QuantizeOptions:
    usual = most_common(forms, items)
    rules = rules_of(by_matrix(items, forms), usual)
    return replace(settled, bits=usual.bits, group_size=usual.group_size, bits_for=rules)


def _quantized_before(source: Artifact) -> bool:
    """Whether the checkpoint came from a GGUF file that holds its weights in few bits."""
    return any(step.facts.get("quantized_types") for step in source.steps[:1])


def _because(growth: dict[str, float], limit: float) -> str:
    figures = [f"{bits} bits {100 * share:+.1f} % of perplexity" for bits, share in growth.items()]
    within = "" if np.isclose(limit, 0) or list(growth.values())[-1] <= limit else ", which nothing here keeps to"
    return f"expected on the calibration text: {', '.join(figures)}; {100 * limit:g} % is allowed (--max-growth){within}"
