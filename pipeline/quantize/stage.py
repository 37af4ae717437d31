"""The quantize stage: runs the work of ``pack`` here, or in an isolated process where the method needs one.

Nothing here imports torch: the process that waits for an isolated one stays small.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions, rows_of, size_in_bytes
from edgepress.pipeline.quantize.isolated import run_isolated
from edgepress.pipeline.registry import require

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Chosen:
    """The options to go by, why, and the expected growth of perplexity (a share) by bits."""

    options: QuantizeOptions
    because: str
    growth: dict[str, float]


def quantize(source: Artifact, out: Path, options: QuantizeOptions) -> JsonObject:
    """Write the checkpoint with its block matrices packed into ``out``; returns the facts for the manifest.

    An interrupted run of an isolated method leaves what it can resume from in ``scratch_of``, and the log says what is kept
    or lost. Raises MissingPackageError, OptionError and ModelError before the work, ProofError when its result is wrong.
    """
    if options.chooses:
        return _chosen(source, out, options)
    method, scratch = METHODS[options.method], scratch_of(out, options.method)
    for package in ("torch", "transformers", *method.packages):
        require(package)
    if not method.isolated:
        from edgepress.pipeline.quantize.pack import quantize_checkpoint

        return quantize_checkpoint(source, out, options, scratch)
    # a string, because importing the function here would load torch into this process
    work = "edgepress.pipeline.quantize.pack:quantize_checkpoint"
    facts = run_isolated(work, (source, out, options, scratch), options.method, scratch)
    assert isinstance(facts, dict)
    return facts


def _chosen(source: Artifact, out: Path, options: QuantizeOptions) -> JsonObject:
    """Choose the bits by trial, then quantize."""
    require("torch")
    work = "edgepress.pipeline.quantize.choose:choose"
    chosen = run_isolated(work, (source, options), "choosing the bits", scratch_of(out, "bits"))
    assert isinstance(chosen, Chosen)
    settled = chosen.options
    kinds = len(settled.bits_for)
    form = f"{settled.weight_bits} bits, groups of {settled.group}"
    form = f"a mix of bits, matrix by matrix (--bits-for, {kinds} rules)" if kinds else form
    form += ", 4 bits for rare tokens in the head" if rows_of(settled.rare_rows) else ""
    log.info("quantize: %s, %s; %s", settled.method, form, chosen.because)
    taken: JsonObject = {
        "method": settled.method,
        "bits": settled.weight_bits,
        "group_size": settled.group,
        "bits_for": settled.bits_for,
        "act_order": settled.act_order,
    }
    facts: JsonObject = {"chosen": taken, "chosen_because": chosen.because, "expected_growth": chosen.growth}
    if rows_of(settled.rare_rows):
        taken["rare_rows"] = settled.rare_rows
    if options.max_size is not None:
        taken["head_bits"] = settled.head_bits
        facts["max_bytes"] = size_in_bytes(options.max_size, "--max-size")  # export looks whether it was kept to
    return quantize(source, out, settled) | facts


def scratch_of(out: Path, method: str) -> Path:
    """The folder next to the output in which a method may work, ``.NAME.METHOD``."""
    return out.with_name(f"{out.name.removesuffix('.partial')}.{method}")
