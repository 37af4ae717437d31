"""What is known of each architecture: one row for everything in which it differs from Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig

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
