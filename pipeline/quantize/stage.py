"""Quantize the matrices of the decoder blocks; what the quantizer chose is stored as PackedLinear and ships unchanged."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.blocks import block_matrices, decoder_blocks
from edgepress.pipeline.checkpoint.load import check_names, meta_model, with_full_names
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.shards import rewrite, shards
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.checkpoint.weights import read_tensor
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.files import folder_bytes, read_json, write_json
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions, bits_rules
from edgepress.pipeline.quantize.isolated import scratch_of
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.registry import load
from edgepress.pipeline.text.windows import text_windows
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
# GPTQ trades error in the weights for error in the outputs, but not much: 1.0 to 1.5 times that of round-to-nearest on real
# models. Zero points that are off by one, the fault to be caught, make it 3.4 times at any width, a wrong order more.
WORST_ERROR = 2.5
_ROWS_PROVEN = 256  # of each matrix, at least, where it has so many: rounding all would take a tenth of GPTQ's own time


def quantize(source: Artifact, out: Path, options: QuantizeOptions) -> dict[str, Any]:
    """Write the checkpoint with its block matrices packed into ``out``; returns the facts for the manifest."""
    carry_files(source.path, out)
    write_json(out / "config.json", read_json(source.path / "config.json"))
    if METHODS[options.method].run is None:
        rewrite(shards(source.path), out, lambda name: name)
        packed.save({}, out)
        return {"bytes": [folder_bytes(source.path), folder_bytes(out)], "linears": 0}

    model = meta_model(source.path, options.trust_remote_code)
    with with_full_names(source.path, model, out) as folder:
        job, used = plan(folder, model, options, scratch_of(out))
        linears = load(str(METHODS[options.method].run))(job)
        missing = sorted(set(job.linears) - set(linears))
        if missing:
            raise ProofError(f"the quantizer left out {missing[0]} and {len(missing) - 1} more; nothing was written")
        errors = _prove_errors(job, linears)
        ends = quantize_ends(folder, model, options)
        linears |= ends
        packed.save(linears, out)
        # A tied model may store its head a second time; it would outlive the packed one.
        tied = model.config.tie_word_embeddings and ends
        dropped = set(linears) | ({"lm_head"} if tied else set())
        rewrite(shards(folder), out, lambda name: None if name.removesuffix(".weight") in dropped else name)
    _prove(linears, out)
    weights = sum(x.shape[0] * x.shape[1] for x in linears.values())
    return {
        "linears": len(linears),
        "head": {name: x.bits for name, x in ends.items()} or "float",
        "bits": {str(bits): sum(x.bits == bits for n, x in linears.items() if n not in ends) for bits in _widths(linears, ends)},
        "kept_float": _kept_float(model, linears),
        "calibration": _calibration(used, options),
        "calibration_positions": sum(len(row) for row in used),
        "bits_per_weight": round(8 * sum(x.nbytes for x in linears.values()) / weights, 3),
        "blocks": sorted({x.group_size for x in linears.values()}),  # -1 as group size becomes repeated scales in such blocks
        "padded": {
            n: x.groups * x.group_size - x.shape[1] for n, x in linears.items() if not x.codebook and x.shape[1] % x.group_size
        },
        "relative_error": errors,
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
    }


def plan(folder: Path, model: PreTrainedModel, options: QuantizeOptions, scratch: Path) -> tuple[QuantizeJob, list[np.ndarray]]:
    """What is to be quantized, and how; the list is filled with the calibration windows once they are used.

    Raises ModelError where the checkpoint does not hold the model's matrices, OptionError for a rule that fits none.
    """
    if model.config.tie_word_embeddings and options.embedding_bits not in (None, options.head_bits):
        raise OptionError(
            f"the embedding is the head in this model and cannot have other bits than --head-bits {options.head_bits}; "
            "leave --embedding-bits out"
        )
    matrices, transposed = block_matrices(model)
    check_names(folder, model, {n: tuple(reversed(s)) if n in transposed else s for n, s in matrices.items()})
    exceptions: dict[str, int] = {}
    unused = list(options.bits_for)
    for name in matrices:
        for rule, (pattern, bits) in zip(options.bits_for, bits_rules(options.bits_for), strict=True):
            if pattern.fullmatch(name):
                exceptions[name] = bits
                unused = [other for other in unused if other != rule]
                break
    if unused:
        raise OptionError(
            f"--bits-for '{unused[0]}' is the first match of no matrix; names are like {next(iter(matrices))}, and an earlier rule "
            "goes first: correct it"
        )
    kept_float = frozenset(name for name, bits in exceptions.items() if bits == 16)
    used: list[np.ndarray] = []

    def windows() -> list[np.ndarray]:
        used[:] = text_windows(
            options.calibration, folder, budget=options.calibration_tokens, skip=options.calibration_skip, shortest=16,
            seed=options.calibration_seed,
        )  # fmt: skip
        return used

    shapes = {name: shape for name, shape in matrices.items() if name not in kept_float}
    others = {name: bits for name, bits in exceptions.items() if bits not in (16, options.weight_bits)}
    return QuantizeJob(folder, shapes, windows, options, scratch, others, kept_float, transposed), used


def quantize_ends(folder: Path, model: PreTrainedModel, options: QuantizeOptions) -> dict[str, PackedLinear]:
    """Embedding and output head rounded to their bits, one matrix under the embedding's name where they are tied.

    A group size must divide the hidden size here, for the embedding is gathered from the same blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    wanted = {embedding: options.embedding_bits or options.head_bits}
    if not model.config.tie_word_embeddings:
        wanted[head] = options.head_bits
    found = {}
    for name, bits in wanted.items():
        if bits == 16:
            continue
        weight = read_tensor(folder, f"{name}.weight")
        longest = options.group if options.group > 0 else 128
        group = next((g for g in (128, 64, 32, 16) if g <= longest and weight is not None and weight.shape[1] % g == 0), None)
        if group is None or weight is None:
            log.info("quantize: %s stays float (its width takes no group size)", name)
            continue
        found[name] = round_to_nearest(name, weight, bits, group, symmetric=bits == 8)
    return found


def _kept_float(model: PreTrainedModel, linears: dict[str, PackedLinear]) -> list[str]:
    """Matrices of the blocks that no quantizer took: experts of MoE models in one 3-D weight, routers, --bits-for ...=16."""
    prefix, blocks = decoder_blocks(model)
    sizes = {f"{prefix}.{n}": p.numel() for n, p in blocks.named_parameters() if p.ndim > 1}
    kept = {name: size for name, size in sizes.items() if name.removesuffix(".weight") not in linears}
    if kept:
        share, largest = 100 * sum(kept.values()) / sum(sizes.values()), max(kept, key=lambda name: kept[name])
        log.info("quantize: %.0f %% of the blocks' weights stay float, %s for one", share, largest)
    return list(kept)


def _widths(linears: dict[str, PackedLinear], ends: dict[str, PackedLinear]) -> list[int]:
    return sorted({x.bits for n, x in linears.items() if n not in ends})


def _calibration(used: list[np.ndarray], options: QuantizeOptions) -> dict[str, Any]:
    """What was read, so that a run can be repeated: hash of the ids, how many, and how they were chosen."""
    if not used:
        return {}
    return {
        "sha256_of_ids": hashlib.sha256(np.concatenate(used).tobytes()).hexdigest(),
        "windows": len(used),
        "token_budget": options.calibration_tokens,
        "seed": "the text from its beginning" if options.calibration_seed is None else options.calibration_seed,
    }


def _prove(linears: dict[str, PackedLinear], out: Path) -> None:
    """Read back what was written; raise ProofError unless every array is the quantizer's."""
    file = PackedFile(out)
    for name, linear in linears.items():
        again = file[name]
        for part in ("codes", "scales", "zeros", "permutation"):
            a, b = getattr(again, part), getattr(linear, part)
            if not (a is b is None or (a is not None and b is not None and np.array_equal(a, b))):
                raise ProofError(f"{name} reads back differently from what was written; is the disk sound?")


def _prove_errors(job: QuantizeJob, linears: dict[str, PackedLinear]) -> dict[str, float]:
    """Relative error of each matrix: ||dequantized - weight|| / ||weight|| (Frobenius).

    Raises ProofError for GPTQ codes that restore a matrix far worse than rounding does: they were read the wrong way.
    """
    found = {}
    for name, tensor in job.weights():
        weight, linear = tensor.numpy(), linears[name]
        restored = linear.dequantized()
        found[name] = round(_distance(restored, weight), 5)
        if METHODS[job.options.method].calibrated:
            some = slice(None, None, max(1, len(weight) // _ROWS_PROVEN))  # a wrong reading spares no row
            rounded = round_to_nearest(name, weight[some], linear.bits, job.options.group, job.options.symmetric).dequantized()
            error, least = _distance(restored[some], weight[some]), _distance(rounded, weight[some])
            if not error <= WORST_ERROR * least + 1e-5:
                raise ProofError(
                    f"{name} came back from GPTQ with an error of {error:.3g}, and rounding to nearest would lose "
                    f"{least:.3g}; give more --calibration-tokens or use --method rtn, and report this"
                )
    return found


def _distance(restored: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(restored - weight)) / (float(np.linalg.norm(weight)) or 1.0)
