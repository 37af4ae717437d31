"""Which bits a model needs: tried by rounding on its own blocks, before anything is written.

Small models lose far more at 4 bits than large ones: SmolLM2-135M a third of its perplexity and more, where a 7 B model loses a few
per cent. What is measured for it is in ``trials.py``; here is what follows from that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.planes import PLANES
from edgepress.pipeline.documents import typed
from edgepress.pipeline.machine import large_blocks_given_back
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions, size_in_bytes
from edgepress.pipeline.quantize.budget import check_possible, fit
from edgepress.pipeline.quantize.head import EIGHT_BITS, Head
from edgepress.pipeline.quantize.mix import (
    BASE,
    CHOICES,
    EIGHT,
    Form,
    Item,
    by_matrix,
    mean_bits,
    rules_of,
    solve,
    usual_form,
)
from edgepress.pipeline.quantize.stage import Chosen
from edgepress.pipeline.quantize.trials import Trial, costs_of
from edgepress.pipeline.report.steps import Import

log = logging.getLogger("edgepress")
# Growth of the loss under a calibrated method, in that of rounding (docs/quantization.md).
CALIBRATED = {"gptq": 0.5, "gptqmodel": 0.7}
# The same of a tune stage, where all matrices have 4 bits, and where they have as many as each needs: there is less to win back
# (docs/tuning.md).
TUNED, TUNED_MIX = 0.6, 0.9
TRIALS = 6  # one that fails takes a text alone, mostly
# A mix that saves less of the artifact's bytes than this is not worth what it costs: most of the loss that is allowed, where 8 bits
# lose next to nothing. A tune stage wins some of it back, and who asked for one wants few bytes.
WORTH, WORTH_TUNED = 0.2, 0.03
# Of the limit, what a mix should use: it is chosen by the text that it is judged by, and loses more on others. One that uses more
# is taken where none that keeps to this is worth it: what a matrix costs is known to an eighth at best, and luck should not decide.
AIM = 0.8


def choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    """Options that settle the bits of every matrix: by ``max_growth``, ``target_bits`` or ``max_size``.

    Measured on the calibration text, of which rounding learns nothing, and on other kinds of text (``Trial``).
    """
    with large_blocks_given_back():  # the weights themselves are such blocks: halved for ``items``, dropped by ``_free``
        return _choose(source, options)


def _choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    if options.max_size is not None:
        check_possible(source.path, options, None)
    trial = Trial(source, options)
    given = options.target_bits is not None or options.max_size is not None
    before = quantized_before(source) and not given and not trial.writes()
    settled = replace(options, max_growth=None, target_bits=None, max_size=None, native_bits=False)
    if before:
        settled = _by_rounding(settled)
        if options.method in CALIBRATED:
            log.info(
                "quantize: rounded to nearest: on weights that were quantized before, GPTQ wins only on the kind of text that it "
                "read; --calibration mixed has several"
            )
    left = left_of(settled)
    left_of_uniform = left * TUNED / TUNED_MIX if options.tuned else left
    if options.max_size is not None:
        return _in_bytes(trial, settled, size_in_bytes(options.max_size, "--max-size"))
    if options.target_bits is not None:
        items = trial.items()
        size = options.target_bits * sum(item.weights for item in items) / 8
        forms = solve(items, forms_of(options), size=size)
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
            if trial.measure(name, trial.all(uniform), left_of_uniform, AIM * limit, head=head, group_size=group) <= AIM * limit:
                return Chosen(replace(chosen, rare_rows=head.rare), _because(trial, limit, name), trial.growth)
        return Chosen(chosen, _because(trial, limit, str(uniform.bits)), trial.growth)
    eight = replace(_by_rounding(settled), bits=EIGHT.bits, group_size=EIGHT.group_size)  # calibration wins nothing there
    worth = WORTH_TUNED if options.tuned else WORTH
    most = trial.saved(trial.all(Form(4, 64)), next(iter(_heads(trial))))
    if trial.measure("8", trial.all(EIGHT), 1.0, all_texts=False) > limit or most < worth:
        return Chosen(eight, _because(trial, limit, "8"), trial.growth)
    items = trial.items()
    mixed = _within(trial, items, limit, left, worth, aim=limit if options.tuned else AIM * limit)
    if mixed is None:
        return Chosen(eight, _because(trial, limit, "8"), trial.growth)
    chosen = replace(_mixed(settled, items, mixed.forms), rare_rows=mixed.head.rare)
    return Chosen(chosen, _because(trial, limit, mixed.name), trial.growth)


def forms_of(options: QuantizeOptions) -> tuple[Form, ...]:
    """What a mean or a size chooses from: what the method can make, or of that what an operator computes with as it is."""
    native = options.native_bits or not PLANES.keys() <= set(METHODS[options.method].bits)
    return CHOICES[native]


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


def _in_bytes(trial: Trial, settled: QuantizeOptions, size: int) -> Chosen:
    """The least loss in an artifact of at most ``size`` bytes. Raises OptionError where none is so small."""
    costs = costs_of(trial.source, trial.options, trial)
    items, found = costs.items, fit(costs, size, forms_of(trial.options))
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


def _within(trial: Trial, items: list[Item], limit: float, left: float, worth: float, aim: float) -> _Mix | None:
    """The mix of fewest bytes whose measured growth keeps to ``aim``, or else one of little more that keeps to the limit.

    None where it saves too little against 8 bits. The estimates need not add up: a bound that a trial exceeds is lowered by as
    much. A trial ends with the first text that exceeds ``aim``; all texts are read only of what may be taken.
    """
    allowed, exceeding = math.log1p(aim) / left, list[tuple[float, _Mix]]()
    for _ in range(TRIALS):
        found = [
            (forms, head)
            for head, cost in _heads(trial).items()
            if cost < allowed and (forms := solve(items, (Form(4, 32), BASE, EIGHT), cost=allowed - cost))
        ]
        forms, head = max(found, key=lambda pair: trial.saved(by_matrix(items, pair[0]), pair[1]))
        if trial.saved(by_matrix(items, forms), head) < worth:
            break
        mix = _Mix(forms, head, _named(f"{mean_bits(items, forms):.1f}", head, trial))
        growth = _measured(trial, items, mix, left, aim)
        if growth <= aim:
            return mix
        exceeding.append((growth, mix))
        allowed *= 0.95 * math.log1p(aim) / math.log1p(growth)
    for growth, mix in sorted(exceeding, key=lambda pair: pair[0]):  # of one text, maybe not the worst
        if growth <= limit and _measured(trial, items, mix, left, limit) <= limit:
            return mix
    return None


def _measured(trial: Trial, items: list[Item], mix: _Mix, left: float, limit: float) -> float:
    """The growth of a mix, on all texts or on one that exceeds ``limit``. left: see ``left_of``."""
    factor = 1.0 if set(mix.forms) == {EIGHT} else left
    return trial.measure(mix.name, by_matrix(items, mix.forms), factor, limit, head=mix.head)


def _heads(trial: Trial) -> dict[Head, float]:
    """The heads to choose from and what they cost: before a tune stage, which does not train the scales of rare rows, one."""
    return {EIGHT_BITS: 0.0} if trial.options.tuned else trial.heads()


def _named(bits: str, head: Head, trial: Trial) -> str:
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


def _because(trial: Trial, limit: float, taken: str) -> str:
    """What was expected of all that was tried; "at least" where one text settled the matter."""
    figures = [
        f"{bits} bits {'at least ' if bits in trial.at_least else ''}{100 * share:+.1f} % of perplexity"
        for bits, share in trial.growth.items()
    ]
    within = "" if trial.growth[taken] <= limit else ", which nothing here keeps to"
    return f"expected: {', '.join(figures)}; {100 * limit:g} % is allowed (--max-growth){within}"
