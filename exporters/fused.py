"""The fused graph for Llama-type models: what onnxruntime runs fastest, written node by node.

Each block is SkipSimplifiedLayerNormalization, one MatMul for q, k and v, GroupQueryAttention with rotary embedding
inside and one cache buffer for past and present, and one MatMul for gate and up. Writing the graph ourselves, rather
than rewriting one that a float exporter made, means that packed weights go from file to file without ever being
float, and that what depends on a layer (its attention window) is read from the config of the model at hand, pruned or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from edgepress.exporters.graph import Builder, last_positions
from edgepress.exporters.matmul_nbits import DOMAIN, stacked
from edgepress.exporters.weights import Weights
from edgepress.pipeline.packed import PackedLinear
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

FLOAT, INT64, INT32 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32
EMBEDDING = "model.embed_tokens"
MODEL_TYPES = ("llama", "mistral", "qwen2")
_BLOCK = {
    "input_layernorm.weight", "post_attention_layernorm.weight",
    *(f"self_attn.{x}_proj.weight" for x in "qkvo"), *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
}  # fmt: skip
_BLOCK_BIASES = {*(f"self_attn.{x}_proj.bias" for x in "qkvo"), *(f"mlp.{x}_proj.bias" for x in ("gate", "up", "down"))}


def obstacle(config: PreTrainedConfig, weights: Weights) -> str | None:
    """Why this model cannot have the fused graph, in a few words; None when it can."""
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type}"
    if head_size(config) % 16:
        return f"head size {head_size(config)} is no multiple of 16, which GroupQueryAttention needs"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn") or config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        return f"rotary embedding of type {rope}"
    if f"{EMBEDDING}.weight" not in weights:
        return f"no weights named {EMBEDDING}"
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for index in range(config.num_hidden_layers):
        known |= {f"model.layers.{index}.{part}" for part in _BLOCK | _BLOCK_BIASES}
    extra = {name for name in weights.names - known if not name.endswith("rotary_emb.inv_freq")}
    return f"weights that it does not know, {min(extra)} for one" if extra else None


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def build(config: PreTrainedConfig, weights: Weights, accuracy_level: int) -> ir.Model:
    """The whole model as ONNX: input_ids, attention_mask, past -> logits, present."""
    b = Builder()
    ids = b.input("input_ids", INT64, ["batch_size", "sequence_length"])
    mask = b.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
    past = [
        tuple(
            b.input(f"past_key_values.{i}.{part}", FLOAT, _cache_shape(config, "past_sequence_length")) for part in ("key", "value")
        )
        for i in range(config.num_hidden_layers)
    ]
    shared = _shared_inputs(b, config, mask)

    residual = b.embedding(ids, _matrix(weights, EMBEDDING), EMBEDDING)
    # The first norm stands alone; each later one adds what the sublayer before it wrote to the residual stream.
    normed = b.op(
        "SimplifiedLayerNormalization",
        [residual, _norm_weight(b, weights, "model.layers.0.input_layernorm")],
        "model.layers.0.input_layernorm",
        axis=-1, epsilon=config.rms_norm_eps, stash_type=1,
    )  # fmt: skip
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        attended = _attention(b, config, weights, index, normed, past[index], shared, accuracy_level)
        normed, residual = _add_and_norm(b, config, weights, residual, attended, f"{name}.post_attention_layernorm")
        written = _mlp(b, weights, f"{name}.mlp", normed, accuracy_level)
        following = f"model.layers.{index + 1}.input_layernorm" if index + 1 < config.num_hidden_layers else "model.norm"
        normed, residual = _add_and_norm(b, config, weights, residual, written, following)

    logits = _head(b, config, weights, last_positions(b, normed), accuracy_level)
    # Declared as one position: GenAI allocates what the shape says, and a symbolic one would have it allocate the prompt's length.
    b.output(logits, "logits", FLOAT, ["batch_size", 1, config.vocab_size])
    for index, node in enumerate(n for n in b.nodes if n.op_type == "GroupQueryAttention"):
        for value, part in zip(node.outputs[1:], ("key", "value"), strict=True):
            b.output(value, f"present.{index}.{part}", FLOAT, _cache_shape(config, "total_sequence_length"))
    return b.model({"edgepress.exporter": "fused", "edgepress.shared_cache": "1"})


def _shared_inputs(b: Builder, config: PreTrainedConfig, mask: ir.Value) -> list[ir.Value]:
    """What every GroupQueryAttention needs: int32 lengths (batch,) minus one, total length, and the rotary tables."""
    lengths = b.op("ReduceSum", [mask, b.integers(1)], "mask.length", keepdims=0)
    last = b.op("Cast", [b.op("Sub", [lengths, b.integers(1)], "mask.last")], "mask.seqlens_k", to=INT32)
    total = b.op("Gather", [b.op("Shape", [mask], "mask.shape"), b.constant("int64_1", np.array(1, dtype=np.int64))], "mask.total")
    total = b.op("Cast", [total], "mask.total_sequence_length", to=INT32)
    positions = torch.arange(config.max_position_embeddings)[None]
    with torch.inference_mode():
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    half = head_size(config) // 2  # transformers repeats the table for both halves of a head
    return [last, total, b.constant("cos_cache", cos[0, :, :half].numpy()), b.constant("sin_cache", sin[0, :, :half].numpy())]


def _attention(
    b: Builder,
    config: PreTrainedConfig,
    weights: Weights,
    index: int,
    x: ir.Value,
    past: tuple[ir.Value, ...],
    shared: list[ir.Value],
    accuracy_level: int,
) -> ir.Value:
    name = f"model.layers.{index}.self_attn"
    qkv = _linear(b, weights, [f"{name}.{x}_proj" for x in "qkv"], f"{name}.qkv_proj", x, accuracy_level)
    attended = b.op(
        "GroupQueryAttention",
        [qkv, None, None, *past, *shared],
        name,
        [name, f"present.{index}.key", f"present.{index}.value"],
        DOMAIN,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        scale=head_size(config) ** -0.5,
        local_window_size=_window(config, index),
        do_rotary=1,
        rotary_interleaved=0,
    )
    return _linear(b, weights, [f"{name}.o_proj"], f"{name}.o_proj", attended, accuracy_level)


def _window(config: PreTrainedConfig, index: int) -> int:
    """Attention window of a layer in tokens, -1 for all; read from the config, never guessed from the layer's index."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds and kinds[index] != "sliding_attention"):
        return -1
    return int(window)


def _mlp(b: Builder, weights: Weights, name: str, x: ir.Value, accuracy_level: int) -> ir.Value:
    both = _linear(b, weights, [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.gate_up_proj", x, accuracy_level)
    gate = b.op("Split", [both], f"{name}.split", [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
    up = gate.producer().outputs[1]
    active = b.op("Mul", [gate, b.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
    return _linear(b, weights, [f"{name}.down_proj"], f"{name}.down_proj", b.op("Mul", [active, up], f"{name}.mul"), accuracy_level)


def _linear(b: Builder, weights: Weights, modules: list[str], name: str, x: ir.Value, accuracy_level: int) -> ir.Value:
    """The modules' outputs for one input side by side: one MatMul where their layouts allow, else several and a Concat."""
    packed = [weights.packed(module) for module in modules]
    if all(p is None for p in packed):
        y = b.linear(x, np.concatenate([weights.array(f"{m}.weight") for m in modules]), name, accuracy_level)
    elif all(p is not None for p in packed) and (whole := stacked(name, packed)) is not None:  # type: ignore[arg-type]
        y = b.linear(x, whole, name, accuracy_level)
    else:
        parts = [
            b.linear(x, weights.array(f"{m}.weight") if p is None else p, m, accuracy_level)
            for m, p in zip(modules, packed, strict=True)
        ]
        y = b.op("Concat", parts, name, axis=-1)
    biased = [f"{module}.bias" in weights for module in modules]
    if not any(biased):
        return y
    widths = [_rows(weights, module) for module in modules]
    bias = [
        weights.array(f"{m}.bias") if has else np.zeros(n, np.float32) for m, has, n in zip(modules, biased, widths, strict=True)
    ]
    return b.op("Add", [y, b.constant(f"{name}.bias", np.concatenate(bias))], f"{name}.biased")


def _rows(weights: Weights, module: str) -> int:
    packed = weights.packed(module)
    return packed.shape[0] if packed else int(weights.array(f"{module}.weight").shape[0])


def _add_and_norm(
    b: Builder, config: PreTrainedConfig, weights: Weights, residual: ir.Value, written: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    """(norm(residual + written), residual + written)."""
    normed = b.op(
        "SkipSimplifiedLayerNormalization",
        [residual, written, _norm_weight(b, weights, name)],
        name,
        [name, "", "", f"{name}.residual"],
        DOMAIN,
        epsilon=config.rms_norm_eps,
    )
    return normed, normed.producer().outputs[3]


def _norm_weight(b: Builder, weights: Weights, name: str) -> ir.Value:
    return b.constant(f"{name}.weight", weights.array(f"{name}.weight"))


def _head(b: Builder, config: PreTrainedConfig, weights: Weights, x: ir.Value, accuracy_level: int) -> ir.Value:
    """Logits; a matrix tied to the embedding is stored once."""
    name = EMBEDDING if config.tie_word_embeddings or "lm_head.weight" not in weights else "lm_head"
    matrix = _matrix(weights, name)
    if not isinstance(matrix, np.ndarray):
        return b.linear(x, matrix, "lm_head", accuracy_level, weight_name=name)
    # Gemm reads the matrix as (vocabulary, hidden), as Gather does
    flat = b.op("Reshape", [x, b.integers(-1, config.hidden_size)], "lm_head.rows")
    scores = b.op("Gemm", [flat, b.constant(f"{name}.weight", matrix)], "lm_head", transB=1)
    shape = b.op("Shape", [x], "lm_head.leading", start=0, end=2)
    shape = b.op("Concat", [shape, b.integers(config.vocab_size)], "lm_head.shape", axis=0)
    return b.op("Reshape", [scores, shape], "logits")


def _matrix(weights: Weights, module: str) -> PackedLinear | np.ndarray:
    packed = weights.packed(module)
    return weights.array(f"{module}.weight") if packed is None else packed


def _cache_shape(config: PreTrainedConfig, length: str) -> list[Any]:
    return ["batch_size", config.num_key_value_heads, length, head_size(config)]
