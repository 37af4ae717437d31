"""Which matrices of a checkpoint are quantized, and to how many bits."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from edgepress.pipeline.checkpoint.blocks import block_matrices, possible_names
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import ModelError, OptionError
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import MIXED, QuantizeOptions, bits_rules
from edgepress.pipeline.own_text.kept import first_read, read_of_mixed, with_text
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.text.windows import text_windows
from transformers import PreTrainedModel

# Tokens of a calibration window. A text begins with a token that all later ones attend to (an attention sink, Xiao et al. 2023,
# section 3.1); one of two thousand hardly counts in GPTQ's Hessians, suffers most, and spoils all others (docs/quantization.md).
WINDOW = 64
READ_TOKENS = 256  # of the calibration text, which show whether the model reads it


@dataclass
class Read:
    """What a quantizer read of the calibration text. text: ``mixed``, ``self`` or a file's name; empty where it read nothing."""

    windows: list[np.ndarray] = field(default_factory=list)
    text: str = ""


def plan(checkpoint: Checkpoint, model: PreTrainedModel, options: QuantizeOptions, scratch: Path) -> tuple[QuantizeJob, Read]:
    """The job of a quantizer, and what it read, which is known once it asked for its windows.

    Raises ModelError where the checkpoint does not hold the model's matrices, OptionError for a rule that matches none.
    """
    if model.config.tie_word_embeddings and options.embedding_bits not in (None, options.head_bits):
        raise OptionError(
            f"the embedding is the head in this model and cannot have other bits than --head-bits {options.head_bits}; "
            "leave --embedding-bits out"
        )
    matrices, transposed = block_matrices(model)
    check_names(checkpoint, model, {n: tuple(reversed(s)) if n in transposed else s for n, s in matrices.items()})
    spared = checkpoint.spared(matrices)
    exceptions = exceptions_of(options, [name for name in matrices if name not in spared])
    untouched = frozenset(name for name, (bits, _) in exceptions.items() if bits == 16) | spared
    read = Read()

    def windows() -> list[np.ndarray]:
        given = with_text(options, checkpoint.path)
        read.text = read_of_mixed(given.calibration) if options.calibration == MIXED else options.calibration.name
        read.windows = text_windows(
            given.calibration, checkpoint.path, budget=given.calibration_tokens, skip=given.calibration_skip, shortest=16,
            length=min(WINDOW, checkpoint.context), seed=given.calibration_seed, key=given.text_key,
        )  # fmt: skip
        with suppress(ModelError):  # of a checkpoint whose tensors have other names than the modules
            loss = mean_loss(checkpoint.offloaded_model(), read.windows[: max(1, READ_TOKENS // WINDOW)])
            warn_unless_readable(loss, model.config.vocab_size, first_read(options.calibration))
        return read.windows

    linears = {name: shape for name, shape in matrices.items() if name not in untouched}
    usual = (options.weight_bits, options.group)
    others = {name: form for name, form in exceptions.items() if form[0] != 16 and form != usual}
    return QuantizeJob(checkpoint, linears, windows, options, scratch, others, untouched, transposed), read


def foresee(source: Path, options: QuantizeOptions, removed: int) -> None:
    """Raise OptionError for a ``bits_for`` rule that matches no matrix of a model once ``removed`` of its layers are gone."""
    if not options.bits_for:
        return
    checkpoint = Checkpoint(source, options.trust_remote_code)
    names = possible_names(checkpoint.meta_model(), removed)
    spared = checkpoint.spared(names)
    exceptions_of(options, [name for name in names if name not in spared])


def exceptions_of(options: QuantizeOptions, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """Bits and group size of the matrices that a ``bits_for`` rule matches; the first match counts.

    Raises OptionError for an unused rule.
    """
    exceptions: dict[str, tuple[int, int]] = {}
    used: set[str] = set()
    if options.bits_for and not names:
        raise OptionError("--bits-for has nothing to choose: every matrix keeps the codes that it has; leave it out")
    rules = list(zip(options.bits_for, bits_rules(options.bits_for), strict=True))
    for name in names:
        for text, rule in rules:
            if rule.pattern.fullmatch(name):
                exceptions[name] = (rule.bits, rule.group_size or options.group)
                used.add(text)
                break
    if unused := [rule for rule in options.bits_for if rule not in used]:
        raise OptionError(
            f"--bits-for '{unused[0]}' is the first match of no matrix; names are like {next(iter(names))}, and an earlier rule "
            "goes first: correct it"
        )
    return exceptions


def check_names(checkpoint: Checkpoint, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the checkpoint holds the model, and every matrix of ``shapes`` under its name and in its shape.

    The headers decide where tensors have the modules' names; else the checkpoint is loaded, which shows what is missing.
    """
    folder, stored = checkpoint.path, checkpoint.shapes
    kept = {f"{name}.weight" for name in checkpoint.weights.matrices}
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in kept}
    if parameters.keys() - stored.keys():
        checkpoint.model()
    why = "" if shapes else "its blocks have no matrices of a known kind"
    if absent := {f"{name}.weight" for name in shapes} - stored.keys() - kept:
        why = f"its weights lack {min(absent)} under that name"
    if why:
        raise ModelError(
            f"{folder} cannot be quantized yet ({why}); load it and save it once with transformers, or use --method none"
        )
    for name, shape in parameters.items():
        if name in stored and stored[name] != shape:
            raise ModelError(
                f"the weights in {folder} do not fit its config.json ({name} is {stored[name]}, not {shape}); replace either"
            )


@contextmanager
def with_full_names(checkpoint: Checkpoint, model: PreTrainedModel, out: Path) -> Iterator[Checkpoint]:
    """The checkpoint with the modules' full names: itself, or a copy of a base model's ("h.0..." for "transformer.h.0...").

    The copy is below ``out`` and is removed afterwards.
    """
    prefix = model.base_model_prefix + "."
    parameters = {name for name, _ in model.named_parameters()}
    if not any(name not in parameters and prefix + name in parameters for name in checkpoint.shapes):
        yield checkpoint
        return
    copy = out / "full-names"
    copy.mkdir()
    try:
        carry_files(checkpoint.path, copy, checkpoint.trust_remote_code)
        shutil.copy2(checkpoint.path / "config.json", copy)
        checkpoint.rewrite(copy, lambda name: prefix + name if prefix + name in parameters else name)
        yield Checkpoint(copy, checkpoint.trust_remote_code)
    finally:
        shutil.rmtree(copy)
