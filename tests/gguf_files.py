"""Llama checkpoints written as GGUF files, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoConfig

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in ENDS:
        return ENDS[name]
    _, _, index, *module, part = name.split(".")
    return f"blk.{index}.{NAMES['.'.join(module)]}.{part}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key as llama.cpp stores them: the halves of each head's rotary pairs beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    source: Path,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    others: Mapping[str, GGMLQuantizationType] | None = None,
    head: bool = False,
) -> dict[str, np.ndarray]:
    """A Llama checkpoint as GGUF, its matrices of one type; returns the weights that it stands for, by Hugging Face's names.

    others: types of the matrices whose GGUF name holds a word. head: store a tied head as a matrix of its own.
    """
    config = AutoConfig.from_pretrained(source)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, *(f"<unused{i}>" for i in range(config.vocab_size - len(tokens)))])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    restored = {}
    tensors = load_file(source / "model.safetensors")
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        stored = weight = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        order = np.arange(len(weight)) if heads is None else interleaved(np.arange(len(weight))[:, None], heads)[:, 0]
        form = next((other for word, other in (others or {}).items() if word in gguf_name(name)), kind)
        if weight.ndim == 2:
            stored = quantize(weight[order], form)
            weight = np.empty_like(weight)
            weight[order] = dequantize(stored, form)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=form if weight.ndim == 2 else None)
        restored[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return restored
