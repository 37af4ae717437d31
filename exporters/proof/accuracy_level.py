"""Accuracy levels of MatMulNBits: float activations (0) or int8 activations (4), chosen by measurement on this machine.

The rule: level 4, unless it changes more of the most likely tokens than ``--min-agreement`` allows, or is not faster.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
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
PAIRS = 3
PROMPT_TOKENS, WARM_UP_TOKENS, TIMED_TOKENS = 16, 2, 24
SECONDS = 2.0  # of a session at most: some widths have no fast kernel at level 0
# Tokens on which each matrix is tried by itself, for --exact-layers N.
TRIAL_TOKENS = 128


@dataclass(frozen=True)
class Choice:
    """The accuracy level that ships, and what led to it.

    tried: the comparison at level 4, None where it was not made. rates: decoded tokens/s by level,
    where both were timed. exact: the matrices that keep float activations at level 4.
    """

    level: int
    because: str
    tried: Parity | None = None
    rates: tuple[tuple[int, float], ...] = ()
    exact: tuple[str, ...] = ()

    @property
    def proof(self) -> Parity | None:
        """The proof of what ships at level 4; None at level 0, which is proven before."""
        return self.tried if self.level else None

    def facts(self) -> JsonObject:
        """As the manifest has them."""
        facts: JsonObject = {"accuracy_level": self.level, "accuracy_level_because": self.because}
        if self.tried is not None:
            tried: dict[str, dict[str, float]] = {"4": {"top1_agreement": self.tried.top1_agreement, "kl_mean": self.tried.kl_mean}}
            for level, rate in self.rates:
                tried.setdefault(str(level), {})["decode_tokens_per_s"] = rate
            facts["accuracy_levels_tried"] = tried
        return facts | ({"exact_layers": list(self.exact)} if self.exact and self.level else {})


def choose(reference: ReferenceLogits, folder: Path, graph: ir.Model, options: ExportOptions) -> Choice:
    """Settle the accuracy levels of ``folder/model.onnx``, which ``graph`` at level 4 was saved as (at 0 where 0 is forced).

    Raises ProofError when level 4 is forced and agreement is below the limit, OptionError for --exact-layers that match nothing.
    """
    names = matrix_names(graph)
    reasons = {
        "asked for": options.accuracy_level == "0",
        "int8 is the CPU's": options.target == "cuda",
        "no matrix has integer weights": not names,
    }
    if options.exact_layers is not None and not names:
        raise OptionError("--exact-layers needs matrices with integer weights, and this model has none; leave it out")
    if because := next((reason for reason, holds in reasons.items() if holds), None):
        log.info("export: accuracy level 0 (%s)", because)
        return Choice(0, because)
    exact = select_exact(folder, names, reference.windows[0], options.exact_layers)
    if exact:
        log.info("export: at float activations: %s", ", ".join(exact))
        save_variant(folder / MODEL, folder / MODEL, lambda node: 0 if matrix_name(node) in exact else 4)
    proof = parity.measure(reference, lambda: Decoder(folder), 4)
    forced = options.accuracy_level == "4"
    agrees = proof.top1_agreement >= options.min_agreement
    if not agrees and forced:
        raise ProofError(_too_different(proof, options))
    rates = decode_rates(folder, reference.windows[0]) if agrees and not forced else {}
    level, because = (4, "asked for") if forced else _decide(proof, rates, options)
    log.info("export: accuracy level %d (%s)", level, because)
    if level == 0:
        save_variant(folder / MODEL, folder / MODEL, level_0)
    return Choice(level, because, proof, tuple(rates.items()), tuple(exact))


def matrix_names(graph: ir.Model) -> list[str]:
    """The matrices whose operators have an accuracy level, in the order of the graph."""
    return [matrix_name(node.name) for node in graph.graph if node.op_type == "MatMulNBits"]


def matrix_name(node: str | None) -> str:
    """The name under which users know a node: without what the portable exporter adds."""
    return (node or "").removesuffix(".matmul")


def _decide(proof: Parity, rates: dict[int, float], options: ExportOptions) -> tuple[int, str]:
    """Level and reason. rates: of levels 0 and 4, empty when level 4 agrees too little."""
    agreement = f"keeps {100 * proof.top1_agreement:.4g} % of the most likely tokens, KL {proof.kl_mean:.2g}"
    if not rates:
        return 0, f"level 4 {agreement}; --min-agreement is {100 * options.min_agreement:g} %"
    ratio = rates[4] / rates[0]
    speeds = f"level 4 decodes {ratio:.2f} times as fast as level 0, {rates[4]:,.0f} against {rates[0]:,.0f} tokens/s"
    return (4, f"{speeds}, and {agreement}") if ratio >= FASTER else (0, f"{speeds}; it would have to be {FASTER} times")


def _too_different(proof: Parity, options: ExportOptions) -> str:
    return (
        f"int8 activations keep {100 * proof.top1_agreement:.4g} % of the most likely tokens (KL {proof.kl_mean:.2g}), and "
        f"--min-agreement asks for {100 * options.min_agreement:g} %; "
        f"give --accuracy-level 0 (float activations), --exact-layers 4 "
        f"(float for the 4 worst matrices), or --min-agreement {int(100 * proof.top1_agreement) / 100}"
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
