"""What is known of each architecture: one row that holds everything in which it differs from Llama.

To add one: docs/adding-a-family.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedConfig

Number = Callable[[PreTrainedConfig], float]


def _unscaled(config: PreTrainedConfig) -> float:
    return 1.0


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama; the defaults are Llama.

    fused: whether the fused graph can express it; False for a row that only has config keys.
    before_*, after_*: names of the norms on the input and on the output of a sublayer, None where there is none.
    packed: query, key and value are one matrix in the checkpoint, gate and up another.
    qk_norm: query and key are normalized over each head, or over all heads together ("width").
    window: which layers attend locally: none, all, or those that config.layer_types lists as sliding_attention.
    rotary_layers: config key of a list with an entry a layer, 0 for a layer without positions; None: all have positions.
    v4_keys: key in rope_parameters -> the name that transformers 4 reads at the top of this architecture's config.json.
    """

    fused: bool = True

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    packed: bool = False
    qk_norm: Literal["head", "width"] | None = None
    window: Literal["none", "all", "layer_types"] = "none"
    rotary_layers: str | None = None
    activation: str = "hidden_act"  # its key in the config
    norm_offset: float = 0.0  # what is added to the stored weight of a norm
    attention_scale: Number = lambda config: head_size(config) ** -0.5
    embedding_scale: Number = _unscaled
    residual_scale: Number = _unscaled  # of what a sublayer adds
    logits_scale: Number = _unscaled
    attention_softcap: Number = lambda config: 0.0  # 0: no cap
    logits_softcap: Number = lambda config: 0.0
    v4_keys: Mapping[str, str] = field(default_factory=dict)

    def sublayers(self) -> tuple[tuple[str, str | None, str | None], ...]:
        """A block's sublayers in order: name, the norm of its input, the norm of its output."""
        return (
            ("self_attn", self.before_attention, self.after_attention),
            ("mlp", self.before_mlp, self.after_mlp),
        )

    def block(self) -> set[str]:
        """Names of the modules that have weights, relative to their block."""
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


@dataclass(frozen=True)
class Part:
    """One of the two parts of a block: the name of its module, and in it of the matrix that writes its output."""

    module: str
    output: str


# As the command line calls them; in every family of the fused graph.
PARTS = {"attention": Part("self_attn", "o_proj"), "feed-forward": Part("mlp", "down_proj")}

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
    "smollm3": Family(window="layer_types", rotary_layers="no_rope_layers"),
    "granite": Family(
        attention_scale=lambda config: config.attention_multiplier,
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logits_scale=lambda config: 1 / config.logits_scaling,
    ),
    "gpt_neox": Family(fused=False, v4_keys={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}),
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
