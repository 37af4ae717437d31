"""What the fused graph may assume of a model: its family's row (models/families.py) and what its config says of each layer.

What depends on a layer (window, rotary embedding) is read from the config of the model at hand, pruned or not, and never
from the layer's index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import torch
from edgepress.models.families import ACTIVATIONS, FAMILIES, head_size
from edgepress.models.rotary import by_layer_type, parameters
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import build_meta_model
from edgepress.pipeline.checkpoint.parts import part_name
from transformers import PreTrainedConfig

# Rotary embeddings whose tables do not depend on the length of the text; those of "dynamic" do only beyond the context.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn", "dynamic")
EMBEDDING = "model.embed_tokens"


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Why this model cannot have the fused graph, in a few words; None when it can."""
    config, weights = checkpoint.config, checkpoint.weights
    family = FAMILIES.get(config.model_type)
    if family is None or not family.fused:
        return f"model type {config.model_type}"
    if head_size(config) % 16:
        return f"head size {head_size(config)} is not a multiple of 16, which GroupQueryAttention needs"
    if (activation := getattr(config, family.activation)) not in ACTIVATIONS:
        return f"activation {activation}"
    if getattr(config, "use_bidirectional_attention", False):
        return "bidirectional attention"
    for index in range(config.num_hidden_layers):
        rotary = parameters(config, index)
        if (kind := rotary.get("rope_type", "default")) not in _FIXED_ROTARY:
            return f"rotary embedding of type {kind}, whose frequencies change with the length of the text"
        if (dimensions := int(head_size(config) * rotary.get("partial_rotary_factor", 1))) % 16:
            return f"rotary embedding of {dimensions} dimensions, not a multiple of 16"
    if f"{EMBEDDING}.weight" not in weights:
        return f"no weights named {EMBEDDING}"
    modules = {f"model.layers.{index}.{name}" for index in range(config.num_hidden_layers) for name in family.block()}
    modules |= {EMBEDDING, "model.norm", "lm_head"}
    known = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    extra = {name for name in weights.names - known if not name.endswith("rotary_emb.inv_freq")}
    return f"unknown weights such as {min(extra)}" if extra else None


def attending_layers(config: PreTrainedConfig, silent: Collection[str]) -> list[int]:
    """Indices of the layers that have attention, and so a cache: all but those whose attention is in ``silent``."""
    return [index for index in range(config.num_hidden_layers) if part_name(index, "attention") not in silent]


def window(config: PreTrainedConfig, index: int) -> int:
    """Tokens that a layer attends to, -1 for all."""
    layers = FAMILIES[config.model_type].window
    local = layers == "all" or (layers == "layer_types" and config.layer_types[index] == "sliding_attention")
    return int(config.sliding_window or -1) if local else -1


def rotary_kind(config: PreTrainedConfig, index: int) -> str | None:
    """Which of ``rotary_tables`` rotates query and key in a layer, None for a layer without positions."""
    key = FAMILIES[config.model_type].rotary_layers
    if key is not None and not getattr(config, key)[index]:
        return None
    return str(config.layer_types[index]) if by_layer_type(config) else ""


def rotary_tables(config: PreTrainedConfig, layers: Iterable[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> cosines and sines float32 (positions, half of the rotated dimensions), of every kind that one of the layers has.

    The architecture's own module computes them, scaling included.
    """
    rotary_class = type(build_meta_model(config, Path(config.name_or_path)).model.rotary_emb)
    module, positions, tables = rotary_class(config), torch.arange(config.max_position_embeddings)[None], {}
    for name in {rotary_kind(config, index) for index in layers} - {None}:
        with torch.inference_mode():
            cos, sin = module(torch.zeros(1), positions, *([name] if name else []))
        half = cos.shape[-1] // 2  # transformers repeats the table for both halves of a head
        tables[str(name)] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    return tables
