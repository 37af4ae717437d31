"""Quantize the matrices of the decoder blocks; what the quantizer chose is stored as PackedLinear and ships unchanged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline import packed
from edgepress.pipeline.artifact import Artifact, folder_bytes, read_json, write_json
from edgepress.pipeline.checkpoint import block_linears, carry_files, load_model, read_tensors, shards
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.packed import PackedFile, PackedLinear
from edgepress.pipeline.quantizers import Job
from edgepress.pipeline.quantizers.rtn import round_to_nearest
from edgepress.pipeline.shards import header, rewrite
from edgepress.pipeline.table import load, look_up
from edgepress.pipeline.tokens import text_windows
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")


# A quantizer: Job -> every named matrix as PackedLinear. To add one: docs/adding-a-quantizer.md.
QUANTIZERS = {
    "rtn": "edgepress.pipeline.quantizers.rtn:quantize",
    "gptq": "edgepress.pipeline.quantizers.gptq:quantize",
    "nf4": "edgepress.pipeline.quantizers.bnb:quantize_4bit",
    "fp4": "edgepress.pipeline.quantizers.bnb:quantize_4bit",
    "int8": "edgepress.pipeline.quantizers.bnb:quantize_int8",
}


def quantize(source: Artifact, out: Path, options: QuantizeOptions) -> dict[str, Any]:
    """Write the checkpoint with its block matrices packed into ``out``; returns the facts for the manifest."""
    carry_files(source.path, out)
    write_json(out / "config.json", read_json(source.path / "config.json"))
    if options.method == "none":
        rewrite(shards(source.path), out, lambda name: name)
        packed.save({}, out)
        return {"bytes": [folder_bytes(source.path), folder_bytes(out)], "linears": 0}

    quantizer = load(look_up(QUANTIZERS, options.method, "method"))
    model = load_model(source.path, options.trust_remote_code)
    shapes = {n: (m.out_features, m.in_features) for n, m in block_linears(model).items()}
    names = {name.removesuffix(".weight") for shard in shards(source.path) for name in header(shard)[0]}
    if not shapes or (absent := set(shapes) - names):
        why = f"its weights lack {min(absent)}.weight under that name" if shapes else "its blocks have no nn.Linear matrices"
        raise ModelError(
            f"{source.path} cannot be quantized yet ({why}); load it and save it once with transformers, or use --method none"
        )
    used: list[np.ndarray] = []

    def windows() -> list[np.ndarray]:
        used[:] = text_windows(
            options.calibration, source.path, budget=options.calibration_tokens, skip=options.calibration_skip, shortest=16
        )
        return used

    linears = quantizer(Job(source.path, shapes, windows, options))
    head = _head(source.path, model, options)
    linears |= head
    missing = sorted(set(shapes) - set(linears))
    if missing:
        raise ProofError(f"the quantizer left out {missing[0]} and {len(missing) - 1} more; nothing was written")
    packed.save(linears, out)
    # A tied model may store its head a second time; it would outlive the packed one.
    dropped = set(linears) | ({"lm_head"} if head and "lm_head" not in head else set())
    rewrite(shards(source.path), out, lambda name: None if name.removesuffix(".weight") in dropped else name)
    _prove(linears, out)
    weights = sum(x.shape[0] * x.shape[1] for x in linears.values())
    return {
        "linears": len(linears),
        "head": {name: x.bits for name, x in head.items()} or "float",
        "calibration_positions": sum(len(row) for row in used),
        "bits_per_weight": round(8 * sum(x.nbytes for x in linears.values()) / weights, 3),
        "padded": {
            n: x.groups * x.group_size - x.shape[1] for n, x in linears.items() if not x.codebook and x.shape[1] % x.group_size
        },
        "relative_error": _errors(source.path, linears),
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
    }


def _head(folder: Path, model: PreTrainedModel, options: QuantizeOptions) -> dict[str, PackedLinear]:
    """The output head rounded to ``head_bits``, under the name of the embedding where both are one matrix; {} to leave it float.

    A group size must divide the hidden size here, for the embedding is gathered from the same blocks.
    """
    if options.head_bits == 16:
        return {}
    tied = model.config.tie_word_embeddings
    matrix = model.get_input_embeddings() if tied else model.get_output_embeddings()
    name = next(n for n, module in model.named_modules() if module is matrix)
    hidden = matrix.weight.shape[1]
    group = next((g for g in (128, 64, 32, 16) if g <= options.group_size and hidden % g == 0), None)
    weight = next((t.float().numpy() for n, t in read_tensors(folder) if n == f"{name}.weight"), None)
    if group is None or weight is None:
        log.info("quantize: the head stays float (its width %d takes no group size)", hidden)
        return {}
    return {name: round_to_nearest(name, weight, options.head_bits, group, symmetric=options.head_bits == 8)}


def _prove(linears: dict[str, PackedLinear], out: Path) -> None:
    """Read back what was written; raise ProofError unless every array is the quantizer's."""
    file = PackedFile(out)
    for name, linear in linears.items():
        again = file[name]
        pairs = [(again.codes, linear.codes), (again.scales, linear.scales), (again.zeros, linear.zeros)]
        if not all(a is b is None or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs):
            raise ProofError(f"{name} reads back differently from what was written; is the disk sound?")


def _errors(folder: Path, linears: dict[str, PackedLinear]) -> dict[str, float]:
    """Relative error of each matrix: ||dequantized - weight|| / ||weight|| (Frobenius)."""
    found = {}
    for name, tensor in read_tensors(folder):
        if (linear := linears.get(name.removesuffix(".weight"))) is not None:
            weight = tensor.float().numpy()
            found[linear.name] = round(float(np.linalg.norm(linear.dequantized() - weight) / np.linalg.norm(weight)), 5)
    return found
