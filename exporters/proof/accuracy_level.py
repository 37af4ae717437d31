"""Accuracy levels of MatMulNBits: float activations (0) or int8 activations (4), chosen by measurement on this machine.

The rule: level 4, unless it changes more of the most likely tokens than ``--min-agreement`` allows, or is not faster.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.files import save_at_levels, variant
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.parity import Parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.pipeline.errors import OptionError, ProofError
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
# Tokens on which each matrix alone is tried, for --exact-layers N.
TRIAL_TOKENS = 128


def choose(
    reference: ReferenceLogits, folder: Path, graph: ir.Model, options: ExportOptions
) -> tuple[dict[str, Any], list[Parity]]:
    """Settle the accuracy levels of ``folder/model.onnx``, which ``graph`` at level 4 was saved as (at 0 where 0 is forced).

    Returns the facts for the manifest and the proof at level 4, if that ships.
    Raises ProofError when level 4 is forced and agreement is below the limit, OptionError for --exact-layers that match nothing.
    """
    names = matrices(graph)
    reasons = {
        "asked for": options.accuracy_level == "0",
        "int8 is the CPU's": options.target == "cuda",
        "no matrix has integer weights": not names,
    }
    if options.exact_layers is not None and not names:
        raise OptionError("--exact-layers: no matrix here has integer weights, so all are at float activations; leave it out")
    if why := next((why for why, holds in reasons.items() if holds), None):
        log.info("export: accuracy level 0 (%s)", why)
        return {"accuracy_level": 0, "accuracy_level_because": why}, []
    exact = exact_layers(folder, names, reference.windows[0], options.exact_layers)
    if exact:
        log.info("export: at float activations: %s", ", ".join(exact))
        save_at_levels(folder / MODEL, folder / MODEL, lambda name: 0 if matrix(name) in exact else 4)
    proof = parity.measure(reference, lambda: Decoder(folder), 4)
    forced = options.accuracy_level == "4"
    agreed = proof.top1_agreement >= options.min_agreement
    if not agreed and forced:
        raise ProofError(_too_different(proof, options))
    rates = decode_rates(folder, reference.windows[0]) if agreed and not forced else {}
    level, why = (4, "asked for") if forced else _rule(proof, rates, options)
    log.info("export: accuracy level %d (%s)", level, why)
    if level == 0:
        save_at_levels(folder / MODEL, folder / MODEL)
    facts: dict[str, Any] = {"accuracy_level": level, "accuracy_level_because": why}
    figures = {"top1_agreement": proof.top1_agreement, "kl_mean": proof.kl_mean}
    tried: dict[str, dict[str, float]] = {"4": figures}
    for key, rate in rates.items():
        tried.setdefault(str(key), {})["decode_tokens_per_s"] = rate
    facts["accuracy_levels_tried"] = tried
    facts |= {"exact_layers": exact} if exact and level else {}
    return facts, [proof] if level else []


def matrices(graph: ir.Model) -> list[str]:
    """The matrices whose activations have a level, by name, in the order of the graph."""
    return [matrix(node.name) for node in graph.graph if node.op_type == "MatMulNBits"]


def matrix(node: str | None) -> str:
    """The name that users know of a node: without what the portable exporter adds."""
    return (node or "").removesuffix(".matmul")


def _rule(proof: Parity, rates: dict[int, float], options: ExportOptions) -> tuple[int, str]:
    kept = f"keeps {100 * proof.top1_agreement:.4g} % of the most likely tokens, KL {proof.kl_mean:.2g}"
    if not rates:
        return 0, f"level 4 {kept}; --min-agreement is {100 * options.min_agreement:g} %"
    ratio = rates[4] / rates[0]
    speeds = f"level 4 decodes {ratio:.2f} times as fast as level 0, {rates[4]:,.0f} against {rates[0]:,.0f} tokens/s"
    return (4, f"{speeds}, and {kept}") if ratio >= FASTER else (0, f"{speeds}; it would have to be {FASTER} times")


def _too_different(proof: Parity, options: ExportOptions) -> str:
    return (
        f"int8 activations keep {100 * proof.top1_agreement:.4g} % of the most likely tokens (KL {proof.kl_mean:.2g}), and "
        f"--min-agreement asks for {100 * options.min_agreement:g} %; "
        f"give --accuracy-level 0 (float activations), --exact-layers 4 "
        f"(float for the 4 worst matrices), or --min-agreement {int(100 * proof.top1_agreement) / 100}"
    )


def decode_rates(folder: Path, ids: np.ndarray) -> dict[int, float]:
    """Decoded tokens a second at levels 0 and 4: medians of steps in several sessions of their own, in turn (0 4, 4 0, 0 4)."""
    seconds: dict[int, list[float]] = {0: [], 4: []}
    with variant(folder) as level_0:
        for pair in range(PAIRS):
            for level in (0, 4) if pair % 2 == 0 else (4, 0):
                seconds[level] += _step_seconds(Decoder(folder, model=MODEL if level else level_0), ids)
    return {level: round(1 / float(np.median(steps)), 2) for level, steps in seconds.items()}


def _step_seconds(decoder: Decoder, ids: np.ndarray) -> list[float]:
    prompt = ids[: min(PROMPT_TOKENS, len(ids))]
    steps = min(TIMED_TOKENS, decoder.context - len(prompt) - WARM_UP_TOKENS)
    decoder.reset(len(prompt) + WARM_UP_TOKENS + steps)
    token = int(decoder.feed(prompt)[-1].argmax())
    seconds: list[float] = []
    while len(seconds) < WARM_UP_TOKENS + steps and (len(seconds) <= WARM_UP_TOKENS or sum(seconds) < SECONDS):
        begun = time.perf_counter()
        token = int(decoder.feed(np.array([token]))[-1].argmax())
        seconds.append(time.perf_counter() - begun)
    return seconds[WARM_UP_TOKENS:]


def exact_layers(folder: Path, names: list[str], ids: np.ndarray, reference: str | None) -> list[str]:
    """The matrices that stay at level 0: those that a regular expression names, or the N that int8 activations hurt most.

    Hurt is measured one matrix at a time: all others at float activations, KL divergence of the logits against all at float.
    """
    if reference is None:
        return []
    if not reference.isdecimal():
        found = [name for name in names if re.fullmatch(reference, name)]
        if not found:
            raise OptionError(
                f"--exact-layers '{reference}' names no matrix; there are: {', '.join([*names[:4], '...', names[-1]])}"
            )
        return found
    count = int(reference)
    if not 0 < count < len(names):
        raise OptionError(
            f"--exact-layers {count}: there are {len(names)} matrices; give 1 to {len(names) - 1}, or --accuracy-level 0"
        )
    ids = ids[:TRIAL_TOKENS]
    exact = _logits(folder, ids, lambda name: 0)
    costs = {}
    for name in progress(names, "int8 activations", "matrix"):
        trial = Quality()
        trial.add(ids, _logits(folder, ids, _only(name)), exact)
        costs[name] = trial.figures()["kl_mean"]
    return sorted(sorted(costs, key=lambda name: -costs[name])[:count], key=names.index)


def _only(name: str) -> Callable[[str], int]:
    return lambda node: 4 if matrix(node) == name else 0


def _logits(folder: Path, ids: np.ndarray, level_of: Callable[[str], int]) -> np.ndarray:
    with variant(folder, level_of) as file:
        return Decoder(folder, model=file).feed(ids, keep=0)
