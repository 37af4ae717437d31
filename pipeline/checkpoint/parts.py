"""Attention or the feed-forward part of a block, gone while the other stays (FinerCut, Zhang et al. 2024; He et al. 2024).

config.json cannot say so. The matrices of such a part are zeros in the checkpoint, so plain transformers computes the model without
it; whoever writes a graph leaves out what writes nothing. The zeros are the record, with or without a manifest.
"""

from __future__ import annotations

from collections.abc import Collection

from edgepress.models.families import FAMILIES, PARTS
from edgepress.pipeline.checkpoint.weights import Weights
from transformers import PreTrainedConfig, PreTrainedModel

_BLOCKS = "model.layers"  # in every family of the fused graph


def has_parts(model_type: str) -> bool:
    """Whether blocks of this architecture are two parts, one added to the residual stream after the other."""
    return model_type in FAMILIES and FAMILIES[model_type].fused


def known_with_parts() -> list[str]:
    """Those architectures, as config.json calls them."""
    return [model_type for model_type in FAMILIES if has_parts(model_type)]


def parameters_left(model: PreTrainedModel, silent: Collection[str]) -> int:
    """Parameters of a model, without those of the silent parts."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not within(silent, name))


def part_name(index: int, part: str) -> str:
    """``model.layers.3.self_attn`` for the attention of block 3. part: a key of ``models.families.PARTS``."""
    return f"{_BLOCKS}.{index}.{PARTS[part].module}"


def silent_parts(weights: Weights, config: PreTrainedConfig) -> frozenset[str]:
    """Names of the parts whose output is zero, whatever enters.

    Packed matrices are never silent: quantize leaves zeros as they are.
    """
    if not has_parts(config.model_type):
        return frozenset()
    outputs = {
        part_name(index, part): f"{part_name(index, part)}.{PARTS[part].output}"
        for index in range(config.num_hidden_layers)
        for part in PARTS
    }
    return frozenset(name for name, output in outputs.items() if _is_zero(weights, output))


def _is_zero(weights: Weights, matrix: str) -> bool:
    for name in (matrix, matrix.split(".", 1)[-1]):  # some checkpoints omit the base model's prefix
        if f"{name}.weight" in weights and name not in weights.matrices:
            return all(weights.index.is_zero(tensor) for tensor in (f"{name}.weight", f"{name}.bias") if tensor in weights)
    return False


def within(parts: Collection[str], name: str) -> bool:
    """Whether a module or tensor belongs to one of the parts."""
    return any(name.startswith(f"{part}.") for part in parts)
