"""Accuracy levels of MatMulNBits: float activations (0) or int8 activations (4), chosen by measurement on this machine.

The rule weighs what int8 activations add against what the artifact has lost already: level 4, unless its own KL divergence
exceeds a tenth of that and KL_FLOOR, or its loss grows by more than a tenth of that and LOSS_FLOOR. Where it does, the few matrices
that cause it keep float activations. Top-1 agreement is recorded and judges nothing: int8 activations exchange the first two
tokens at 3 to 7 % of the positions of real models whose perplexity they leave as it is.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.builder import PART
from edgepress.exporters.graph.files import level_0, save_variant, variant
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.parity import Parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.options import ExportOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.runtime.decoder import MODEL, Decoder

log = logging.getLogger("edgepress")
# Int8 activations cost a little accuracy, so they have to pay for it; it also keeps noise from deciding where both are alike.
FASTER = 1.05
SHARE = 0.1  # of what is lost already, that int8 activations may add
KL_FLOOR, LOSS_FLOOR = 0.01, 0.005  # nats a token that they may add in any case; a loss of 0.005 is half a per cent of perplexity
WORST = 4  # matrices that get float activations where int8 adds too much
# What the portable exporter adds to a name, and the row at which a part of a matrix begins.
_ADDED = re.compile(rf"(\.matmul)?({re.escape(PART)}\d+)?$")
PAIRS = 3
PROMPT_TOKENS, WARM_UP_TOKENS, TIMED_TOKENS = 16, 2, 24
SECONDS = 2.0  # of a session at most: some widths have no fast kernel at level 0
# Tokens on which each matrix is tried by itself, for --exact-layers N.
TRIAL_TOKENS = 128


@dataclass(frozen=True)
class Lost:
    """What the checkpoint has lost to its original, in nats a token: KL divergence, and growth of the loss."""

    kl: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What int8 activations may add, in nats a token; loss None: only the KL divergence is judged."""

    kl: float
    loss: float | None

    @classmethod
    def of(cls, options: ExportOptions, lost: Lost) -> Limits:
        """As the user asked for, or as the rule has it."""
        if options.max_added_kl is not None:
            return cls(options.max_added_kl, None)
        return cls(max(KL_FLOOR, SHARE * lost.kl), max(LOSS_FLOOR, SHARE * lost.loss))

    def exceeded(self, proof: Parity) -> str:
        """What level 4 adds too much of, in words; "" when it is within the limits."""
        if proof.kl_mean > self.kl:
            return f"adds KL {proof.kl_mean:.2g}, and {self.kl:.2g} is allowed"
        if self.loss is not None and proof.loss_change - 2 * proof.loss_change_error > self.loss:
            growth, allowed = 100 * np.expm1([proof.loss_change, self.loss])
            return f"adds {growth:.1f} % of perplexity, and {allowed:.1f} % is allowed"
        return ""


@dataclass(frozen=True)
class Choice:
    """The accuracy level that ships, and what led to it.

    tried: the comparison at level 4, None where it was not made. rates: decoded tokens/s by level,
    where both were timed. exact: the matrices that keep float activations at level 4. limit: KL that level 4 was held to.
    """

    level: int
    because: str
    tried: Parity | None = None
    rates: tuple[tuple[int, float], ...] = ()
    exact: tuple[str, ...] = ()
    limit: float | None = None

    @property
    def proof(self) -> Parity | None:
        """The proof of what ships at level 4; None at level 0, which is proven before."""
        return self.tried if self.level else None

    def _added(self) -> dict[str, float]:
        assert self.tried is not None
        names = ("top1_agreement", "kl_mean", "loss_change", "loss_change_error")
        return {name: getattr(self.tried, name) for name in names}

    def facts(self) -> JsonObject:
        """As the manifest has them."""
        facts: JsonObject = {"accuracy_level": self.level, "accuracy_level_because": self.because}
        if self.tried is not None:
            tried: dict[str, dict[str, float]] = {"4": self._added()}
            for level, rate in self.rates:
                tried.setdefault(str(level), {})["decode_tokens_per_s"] = rate
            facts["accuracy_levels_tried"] = tried
        if self.limit is not None:
            facts["max_added_kl"] = self.limit
        return facts | ({"exact_layers": list(self.exact)} if self.exact and self.level else {})


def choose(
    reference: ReferenceLogits, folder: Path, graph: ir.Model, options: ExportOptions, lost: Callable[[], Lost] = Lost
) -> Choice:
    """Settle the accuracy levels of ``folder/model.onnx``, which ``graph`` at level 4 was saved as (at 0 where 0 is forced).

    lost: asked only where the answer matters. Raises ProofError when level 4 is forced and adds more than --max-added-kl,
    OptionError for --exact-layers that match nothing.
    """
    names = matrix_names(graph)
    reasons = {
        "asked for": options.accuracy_level == "0",
        "int8 is the CPU's": options.target != "cpu",
        "no matrix has integer weights": not names,
    }
    if options.exact_layers is not None and not names:
        raise OptionError("--exact-layers needs matrices with integer weights, and this model has none; leave it out")
    if because := next((reason for reason, holds in reasons.items() if holds), None):
        log.info("export: accuracy level 0 (%s)", because)
        return Choice(0, because)
    exact = select_exact(folder, names, reference.windows[0], options.exact_layers)
    proof = _measured(reference, folder, exact)
    if options.accuracy_level == "4":
        if options.max_added_kl is not None and proof.kl_mean > options.max_added_kl:
            raise ProofError(_too_different(proof, options.max_added_kl))
        choice = Choice(4, "asked for", proof, exact=tuple(exact), limit=options.max_added_kl)
    else:
        choice = _weighed(reference, folder, graph, options, lost, exact, proof)
    log.info("export: accuracy level %d (%s)", choice.level, choice.because)
    if choice.level == 0:
        save_variant(folder / MODEL, folder / MODEL, level_0)
    return choice


def _weighed(
    reference: ReferenceLogits,
    folder: Path,
    graph: ir.Model,
    options: ExportOptions,
    lost: Callable[[], Lost],
    exact: list[str],
    proof: Parity,
) -> Choice:
    """The rule: level 4 as measured in ``proof``, or with more matrices at float activations, or level 0."""
    small = proof.kl_mean <= KL_FLOOR and proof.loss_change <= LOSS_FLOOR and options.max_added_kl is None
    limits = Limits.of(options, Lost() if small else lost())
    excess = limits.exceeded(proof)
    for candidate in _candidates(folder, graph, reference, options) if excess else ():
        trial = _measured(reference, folder, candidate)
        if not limits.exceeded(trial):
            exact, proof, excess = candidate, trial, ""
            break
    rates = {} if excess else decode_rates(folder, reference.windows[0])
    level, because = _decide(proof, rates, excess)
    return Choice(level, because, proof, tuple(rates.items()), tuple(exact), limits.kl if level else None)


def _measured(reference: ReferenceLogits, folder: Path, exact: Sequence[str]) -> Parity:
    """What level 4 adds with the matrices ``exact`` at float activations; ``folder/model.onnx`` is left so."""
    if exact:
        more = f" and {len(exact) - WORST} more" if len(exact) > WORST else ""
        log.info("export: at float activations: %s%s", ", ".join(exact[:WORST]), more)
        save_variant(folder / MODEL, folder / MODEL, lambda node: 0 if matrix_name(node) in exact else 4)
    return parity.measure(reference, lambda: Decoder(folder), 4)


def _candidates(folder: Path, graph: ir.Model, reference: ReferenceLogits, options: ExportOptions) -> Iterator[list[str]]:
    """Sets of matrices to keep at float activations, the smallest first.

    The last has all but those of 8 bits, for which onnxruntime has no fast kernel with float activations: a head of 8 bits
    alone would cost most of the speed.
    """
    names = matrix_names(graph)
    if options.exact_layers is None and len(names) > WORST:
        yield select_exact(folder, names, reference.windows[0], str(WORST))
    wide = {matrix_name(n.name) for n in graph.graph if n.op_type == "MatMulNBits" and n.attributes["bits"].as_int() == 8}
    if wide and len(wide) < len(names):
        yield [name for name in names if name not in wide]


def matrix_names(graph: ir.Model) -> list[str]:
    """The matrices whose operators have an accuracy level, in the order of the graph."""
    return list(dict.fromkeys(matrix_name(node.name) for node in graph.graph if node.op_type == "MatMulNBits"))


def matrix_name(node: str | None) -> str:
    """The name under which users know a node: without what the portable exporter adds, and the row at which a part of it begins."""
    return _ADDED.sub("", node or "")


def _decide(proof: Parity, rates: dict[int, float], excess: str) -> tuple[int, str]:
    """Level and reason. rates: of levels 0 and 4. excess: what level 4 adds too much of, "" for nothing."""
    if excess:
        return 0, f"level 4 {excess}"
    ratio = rates[4] / rates[0]
    digits = next((n for n in range(2, 9) if f"{ratio:.{n}f}" != f"{FASTER:.{n}f}"), 2)  # or one number would stand against itself
    speeds = f"level 4 decodes {ratio:.{digits}f} times as fast as level 0, {rates[4]:,.0f} against {rates[0]:,.0f} tokens/s"
    added = f"adds KL {proof.kl_mean:.2g}, {100 * np.expm1(proof.loss_change):+.1f} % of perplexity"
    return (4, f"{speeds}, and {added}") if ratio >= FASTER else (0, f"{speeds}; it would have to be {FASTER} times")


def _too_different(proof: Parity, limit: float) -> str:
    return (
        f"int8 activations add KL {proof.kl_mean:.2g}, and --max-added-kl allows {limit:g}; give --accuracy-level 0 (float "
        f"activations), --exact-layers {WORST} (float for the {WORST} worst matrices), or --max-added-kl {1.1 * proof.kl_mean:.2g}"
    )


def decode_rates(folder: Path, ids: np.ndarray) -> dict[int, float]:
    """Decoded tokens/s at levels 0 and 4: medians of steps in PAIRS sessions each, in alternating order (0 4, 4 0, 0 4)."""
    seconds: dict[int, list[float]] = {0: [], 4: []}
    with variant(folder) as float_graph:
        for pair in range(PAIRS):
            for level in (0, 4) if pair % 2 == 0 else (4, 0):
                seconds[level] += _step_seconds(Decoder(folder, model=MODEL if level else float_graph), ids)
    return {level: round(1 / float(np.median(steps)), 2) for level, steps in seconds.items()}


def _step_seconds(decoder: Decoder, ids: np.ndarray) -> list[float]:
    prompt = ids[: min(PROMPT_TOKENS, len(ids))]
    steps = min(TIMED_TOKENS, decoder.context - len(prompt) - WARM_UP_TOKENS)
    decoder.reset(len(prompt) + WARM_UP_TOKENS + steps)
    token = int(decoder.feed(prompt)[-1].argmax())
    seconds: list[float] = []
    while len(seconds) < WARM_UP_TOKENS + steps and (len(seconds) <= WARM_UP_TOKENS or sum(seconds) < SECONDS):
        start = time.perf_counter()
        token = int(decoder.feed(np.array([token]))[-1].argmax())
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP_TOKENS:]


def select_exact(folder: Path, names: list[str], ids: np.ndarray, requested: str | None) -> list[str]:
    """The matrices that keep float activations: those that a regular expression matches, or the N that int8 hurts most.

    Hurt is measured one matrix at a time: KL divergence of the logits, with all others at float activations, against all at
    float. Raises OptionError for an expression that matches nothing and for a number out of range.
    """
    if requested is None:
        return []
    if not requested.isdecimal():
        matches = [name for name in names if re.fullmatch(requested, name)]
        if not matches:
            raise OptionError(
                f"--exact-layers '{requested}' names no matrix; there are: {', '.join([*names[:4], '...', names[-1]])}"
            )
        return matches
    count = int(requested)
    if not 0 < count < len(names):
        raise OptionError(
            f"--exact-layers {count}: there are {len(names)} matrices; give 1 to {len(names) - 1}, or --accuracy-level 0"
        )
    ids = ids[:TRIAL_TOKENS]
    reference = _logits(folder, ids, level_0)
    costs = {}
    for name in progress(names, "int8 activations", "matrix"):
        trial = Quality()
        trial.add(ids, _logits(folder, ids, _int8_only_in(name)), reference)
        costs[name] = trial.figures()["kl_mean"]
    return sorted(sorted(costs, key=lambda name: -costs[name])[:count], key=names.index)


def _int8_only_in(name: str) -> Callable[[str], int]:
    return lambda node: 4 if matrix_name(node) == name else 0


def _logits(folder: Path, ids: np.ndarray, level_of: Callable[[str], int]) -> np.ndarray:
    with variant(folder, level_of) as file:
        return Decoder(folder, model=file).feed(ids, keep=0)
