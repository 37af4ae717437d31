"""What the fused graph must know of a model: where its family departs from Llama, and what its config says of each layer.

A family is one row of FAMILIES. What depends on a layer (window, rotary embedding) is read from the config of the model at
hand, pruned or not, and never from the layer's index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from edgepress.exporters.weights import Weights
from edgepress.pipeline.checkpoint import quiet
from transformers import AutoModelForCausalLM, PreTrainedConfig

Number = Callable[[PreTrainedConfig], float]


def _one(config: PreTrainedConfig) -> float:
    return 1.0


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Family:
    """Where the blocks of an architecture depart from Llama's; the defaults are Llama.

    before_*, after_*: names of the norms of what a sublayer reads and of what it writes, None where there is none.
    packed: query, key and value are one matrix in the checkpoint, gate and up another.
    qk_norm: query and key are normalized over each head, or over all heads together ("width").
    window: which layers attend locally: none, all, or those that config.layer_types says.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    packed: bool = False
    qk_norm: Literal["head", "width"] | None = None
    window: Literal["none", "all", "layer_types"] = "none"
    activation: str = "hidden_act"  # its key in the config
    norm_offset: float = 0.0  # what is added to the stored weight of a norm
    attention_scale: Number = lambda config: head_size(config) ** -0.5
    embedding_scale: Number = _one
    residual_scale: Number = _one  # of what a sublayer adds
    logits_scale: Number = _one
    attention_softcap: Number = lambda config: 0.0  # 0: no cap
    logits_softcap: Number = lambda config: 0.0

    def block(self) -> set[str]:
        """Names of a block's modules with weights, without the block's own."""
        norms = {self.before_attention, self.after_attention, self.before_mlp, self.after_mlp} - {None}
        extra = {"self_attn.q_norm", "self_attn.k_norm"} if self.qk_norm else set()
        linears = {f"self_attn.{x}" for x in (*self.qkv(), "o_proj")} | {f"mlp.{x}" for x in (*self.gate_up(), "down_proj")}
        return {str(norm) for norm in norms} | extra | linears

    def qkv(self) -> tuple[str, ...]:
        """The matrices of query, key and value."""
        return ("qkv_proj",) if self.packed else ("q_proj", "k_proj", "v_proj")

    def gate_up(self) -> tuple[str, ...]:
        """The matrices of gate and up."""
        return ("gate_up_proj",) if self.packed else ("gate_proj", "up_proj")


_GEMMA = Family(norm_offset=1.0, embedding_scale=lambda config: config.hidden_size**0.5)
_GEMMA2 = replace(
    _GEMMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    window="layer_types",
    activation="hidden_activation",
    attention_scale=lambda config: config.query_pre_attn_scalar**-0.5,
    logits_softcap=lambda config: config.final_logit_softcapping or 0.0,
)

FAMILIES = {
    "llama": Family(),
    "mistral": Family(window="all"),
    "qwen2": Family(window="layer_types"),
    "qwen3": Family(window="layer_types", qk_norm="head"),
    "phi3": Family(window="all", packed=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA2, attention_softcap=lambda config: config.attn_logit_softcapping or 0.0),
    "gemma3_text": replace(_GEMMA2, qk_norm="head"),
    "olmo2": Family(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        qk_norm="width",
    ),
    "smollm3": Family(window="layer_types"),
    "granite": Family(
        attention_scale=lambda config: config.attention_multiplier,
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logits_scale=lambda config: 1 / config.logits_scaling,
    ),
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# Rotary embeddings whose tables do not depend on the length of the text.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
EMBEDDING = "model.embed_tokens"


def obstacle(config: PreTrainedConfig, weights: Weights) -> str | None:
    """Why this model cannot have the fused graph, in a few words; None when it can."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"model type {config.model_type}"
    if head_size(config) % 16:
        return f"head size {head_size(config)} is no multiple of 16, which GroupQueryAttention needs"
    if (activation := getattr(config, family.activation)) not in ACTIVATIONS:
        return f"activation {activation}"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention that looks ahead"
    for index in range(config.num_hidden_layers):
        rotary = _rotary_parameters(config, index)
        if (kind := rotary.get("rope_type", "default")) not in _FIXED_ROTARY:
            return f"rotary embedding of type {kind}, whose frequencies change with the length of the text"
        if (turned := int(head_size(config) * rotary.get("partial_rotary_factor", 1))) % 16:
            return f"rotary embedding of {turned} dimensions, no multiple of 16"
    if f"{EMBEDDING}.weight" not in weights:
        return f"no weights named {EMBEDDING}"
    modules = {f"model.layers.{index}.{name}" for index in range(config.num_hidden_layers) for name in family.block()}
    modules |= {EMBEDDING, "model.norm", "lm_head"}
    known = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    extra = {name for name in weights.names - known if not name.endswith("rotary_emb.inv_freq")}
    return f"weights that it does not know, {min(extra)} for one" if extra else None


def window(config: PreTrainedConfig, index: int) -> int:
    """Tokens that a layer attends to, -1 for all."""
    which = FAMILIES[config.model_type].window
    local = which == "all" or (which == "layer_types" and config.layer_types[index] == "sliding_attention")
    return int(config.sliding_window or -1) if local else -1


def rotary_kind(config: PreTrainedConfig, index: int) -> str | None:
    """Which of ``rotary_tables`` a layer turns query and key by, None for a layer without positions."""
    if config.model_type == "smollm3" and not config.no_rope_layers[index]:
        return None
    return str(config.layer_types[index]) if _by_layer_type(config) else ""


def rotary_tables(config: PreTrainedConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> cosines and sines float32 (positions, half of the dimensions turned), of all kinds that some layer has.

    They are what the architecture's own module computes, scaling and all.
    """
    with torch.device("meta"), quiet():
        kind: Any = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    module, positions, tables = kind(config), torch.arange(config.max_position_embeddings)[None], {}
    for name in {rotary_kind(config, index) for index in range(config.num_hidden_layers)} - {None}:
        with torch.inference_mode():
            cos, sin = module(torch.zeros(1), positions, *([name] if name else []))
        half = cos.shape[-1] // 2  # transformers repeats the table for both halves of a head
        tables[str(name)] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    return tables


def _by_layer_type(config: PreTrainedConfig) -> bool:
    return any(isinstance(value, dict) for value in config.rope_parameters.values())


def _rotary_parameters(config: PreTrainedConfig, index: int) -> dict[str, Any]:
    found = config.rope_parameters[config.layer_types[index]] if _by_layer_type(config) else config.rope_parameters
    return dict(found)
