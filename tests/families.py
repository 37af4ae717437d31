"""A small random model of every decoder family: configs that use what the family is known for, at sizes a test can afford."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# A Llama of 4 layers that takes no time.
TINY = {
    "vocab_size": 5120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

LAYERS = 7
WINDOW = 8  # shorter than the texts of the tests, so that local attention differs from global
_COMMON = {"vocab_size": 5120, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_WIDE = _LLAMA | {"head_dim": 32}  # heads wider than the residual stream would make them
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OLD = _COMMON | {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"tie_word_embeddings": False},
    "mistral": _LLAMA | {"sliding_window": WINDOW},
    "qwen2": _LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4, "tie_word_embeddings": True},
    "qwen3": _WIDE | {"tie_word_embeddings": True},
    "gemma": _WIDE,
    # caps that scores and logits of this size come near
    "gemma2": _WIDE
    | {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": _WIDE | {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
    "phi": _LLAMA | {"num_key_value_heads": 4},
    "phi3": _LLAMA | {"sliding_window": WINDOW},
    "olmo2": _LLAMA,
    "smollm3": _LLAMA | {"no_rope_layer_interval": 2},
    "granite": _LLAMA
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "gpt2": _OLD,
    "opt": _COMMON
    | {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 256}
    | {"word_embed_proj_dim": 64, "dropout": 0.0},
    "gpt_neox": _LLAMA | {"rotary_pct": 0.5},
    "gpt_neo": _COMMON
    | {"hidden_size": 64, "num_layers": LAYERS, "num_heads": 4, "max_position_embeddings": 256, "window_size": WINDOW}
    | {"attention_types": [[["global", "local"], 3], [["global"], 1]]},
    "bloom": _COMMON | {"hidden_size": 64, "n_layer": LAYERS, "n_head": 4},
    "falcon": _COMMON | {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 256},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _WIDE | _MOE | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "gpt_oss": _WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "num_attention_heads": 4},
    "llama4_text": _WIDE
    | {"intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 3, "attention_chunk_size": 128}
    | {"no_rope_layer_interval": 3},
    "qwen3_next": _WIDE
    | _MOE
    | {"num_experts": 4, "shared_expert_intermediate_size": 32, "full_attention_interval": 2, "linear_num_value_heads": 4}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "deepseek_v3": _LLAMA
    | {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 3, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16}
    | {"qk_nope_head_dim": 16, "v_head_dim": 16},
}


def family_config(name: str) -> PreTrainedConfig:
    """The config of one of FAMILIES."""
    return CONFIG_MAPPING[name](**FAMILIES[name])
