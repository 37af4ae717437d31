"""What each matrix costs at each number of bits, and the bits that a mean allows: the table behind ``--target-bits``."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import SensitivityOptions
from edgepress.pipeline.own_text.kept import first_read, with_text
from edgepress.pipeline.quantize.curvature import Errors, costs
from edgepress.pipeline.quantize.mix import BASE, CHOICES, FORMS, Form, Item, by_matrix, items_of, rules_of, solve, usual_form
from edgepress.pipeline.text.windows import text_windows
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
WINDOW = 64  # tokens: many short windows make the estimate better than few long ones


@dataclass(frozen=True)
class Sensitivity:
    """The costs of all matrices, and the form of each that ``target_bits`` allows at least loss."""

    target_bits: float
    items: tuple[Item, ...]
    forms: tuple[Form, ...]

    @property
    def usual(self) -> Form:
        """The form of most weights in blocks as long as the head's."""
        return usual_form(self.forms, self.items)

    @property
    def bits_for(self) -> tuple[str, ...]:
        """``bits_for`` rules for the matrices of other forms than the usual one."""
        return rules_of(by_matrix(self.items, self.forms), self.usual)

    def to_json(self, model: str) -> JsonObject:
        """The content of sensitivity.json; model: name of the checkpoint."""
        rows = [
            {
                "matrices": list(item.names), "weights": item.weights, "kl": {str(form): cost for form, cost in item.costs.items()},
                "bytes": {str(form): size for form, size in item.bytes.items()}, "form": str(form),
            }
            for item, form in zip(self.items, self.forms, strict=True)
        ]  # fmt: skip
        usual = {"bits": self.usual.bits, "group_size": self.usual.group_size, "bits_for": list(self.bits_for)}
        return {"model": model, "target_bits": self.target_bits, "quantize": usual, "rows": rows}


def measure(checkpoint: Checkpoint, options: SensitivityOptions) -> Sensitivity:
    """One pass over the calibration text, of ``mixed`` over what is shipped: see curvature.py.

    Raises TextError for a text of less than a window.
    """
    named = first_read(options.calibration)
    options = with_text(options, checkpoint.path, shipped=True)
    windows = text_windows(
        options.calibration, checkpoint.path, budget=options.calibration_tokens, skip=options.calibration_skip,
        length=min(WINDOW, checkpoint.context), key=options.text_key,
    )  # fmt: skip
    model = checkpoint.model()
    warn_unless_readable(mean_loss(model, windows), model.config.vocab_size, named)
    items = items_of_model(model, windows, checkpoint.spared(block_linears(model)), spent=True)
    size = options.target_bits * sum(item.weights for item in items) / 8
    return Sensitivity(options.target_bits, tuple(items), tuple(solve(items, CHOICES[options.native_bits], size=size)))


def items_of_model(
    model: PreTrainedModel, windows: list[np.ndarray], without: Collection[str] = (), symmetric: bool = False, spent: bool = False
) -> list[Item]:
    """What each matrix costs at each form, but for those in ``without``.

    spent: nobody needs the model's weights any more, which saves two thirds of the memory.
    """
    whole = [row for row in windows if len(row) == len(windows[0])]
    log.info("sensitivity: every matrix at once, on %d windows of %d tokens", len(whole), len(whole[0]))
    errors = Errors(model, *BASE, without, symmetric, spent)
    if not errors.modules:
        raise OptionError("there is nothing to measure: every matrix keeps the codes that it has")
    by_name = costs(model, errors, whole)
    return items_of(errors, by_name, errors.together)


def table(sensitivity: Sensitivity) -> str:
    """The rows as text, the most sensitive weights first, and what to give quantize for the mean asked for."""
    rows = sorted(zip(sensitivity.items, sensitivity.forms, strict=True), key=lambda row: -row[0].costs[BASE] / row[0].weights)
    width = max(len(_label(item)) for item, _ in rows)
    lines = [f"{'matrices':<{width}} {'weights':>11} " + " ".join(f"{f'KL {form}':>10}" for form in FORMS) + f" {'chosen':>8}"]
    for item, form in rows:
        figures = " ".join(f"{item.costs[other]:>10.2e}" for other in FORMS)
        lines.append(f"{_label(item):<{width}} {item.weights:>11,} {figures} {form!s:>8}")
    usual, rules = sensitivity.usual, sensitivity.bits_for
    flags = " ".join(f"--bits-for '{rule}'" for rule in rules)
    lines += ["", f"for {sensitivity.target_bits:g} bits a weight (the same as --target-bits {sensitivity.target_bits:g}):"]
    lines += [f"--bits {usual.bits} --group-size {usual.group_size} {flags}".rstrip(), "", "or in a recipe:", "quantize:"]
    lines += [f"  bits: {usual.bits}", f"  group_size: {usual.group_size}"]
    return "\n".join(lines + (["  bits_for:", *(f"    - '{rule}'" for rule in rules)] if rules else []))


def _label(item: Item) -> str:
    """``model.layers.0.self_attn.q_proj, k_proj, v_proj``."""
    first, *others = item.names
    return ", ".join([first, *(name.rpartition(".")[2] for name in others)])
