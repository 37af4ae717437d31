"""The fused graph for Llama and its relatives, written node by node: what onnxruntime runs fastest.

Each block is SkipSimplifiedLayerNormalization, one MatMul for q, k and v, GroupQueryAttention with rotary embedding
inside and one cache buffer for past and present, and one MatMul for gate and up. Because the graph is written here and
not rewritten from one that a float exporter made, packed weights go from file to file without ever being float, and
what depends on a layer is read from the config of the model at hand (exporters/architecture.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from edgepress.exporters.architecture import EMBEDDING, attending_layers, rotary_kind, rotary_tables, window
from edgepress.exporters.graph.builder import Builder, block_output, last_positions
from edgepress.exporters.graph.operators import DOMAIN, stacked
from edgepress.exporters.graph.rotary import rotary_values
from edgepress.models.families import FAMILIES, head_size
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear

INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
PADDED_ON_THE_LEFT = "pad_on_the_right__this_graph_cannot_be_padded_on_the_left"  # onnxruntime names it in its error


def build(checkpoint: Checkpoint, accuracy_level: int, builder: Builder) -> ir.Model:
    """The whole model as ONNX: input_ids, attention_mask, past -> logits, present.

    builder: an empty one, of the type that activations, cache and scales have, float32 or float16.
    """
    return _Graph(checkpoint, accuracy_level, builder).model()


class _Graph:
    """Writes one model. Hidden states are (batch, tokens, hidden); the residual stream is what blocks add to."""

    def __init__(self, checkpoint: Checkpoint, accuracy_level: int, builder: Builder) -> None:
        self.config, self.weights, self.matrix = checkpoint.config, checkpoint.weights, checkpoint.matrix
        self.accuracy_level = accuracy_level
        self.family, self.silent = FAMILIES[self.config.model_type], checkpoint.silent
        self.b = builder

    def model(self) -> ir.Model:
        b, config, count = self.b, self.config, self.config.num_hidden_layers
        attending = attending_layers(config, self.silent)
        ids = b.input("input_ids", INT64, ["batch_size", "sequence_length"])
        mask = b.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        parts = ("key", "value")
        past = [
            [b.input(f"past_key_values.{i}.{part}", b.float, self._cache_shape("past_sequence_length")) for part in parts]
            for i in range(len(attending))
        ]
        lengths, tables = self._lengths(mask), self._tables(attending)

        residual = b.embedding(ids, self.matrix(EMBEDDING), EMBEDDING)
        residual = self._scaled(residual, self.family.embedding_scale(config), f"{EMBEDDING}.scaled")
        output: ir.Value | None = None  # of the previous sublayer, not yet added to the residual stream
        entered = ""  # what the stream is called once that is added
        for index in range(count):
            name = f"model.layers.{index}"
            for sublayer, before, after in self.family.sublayers():
                if f"{name}.{sublayer}" in self.silent:
                    continue
                x, residual = self._add_and_norm(residual, output, before and f"{name}.{before}", entered)
                if sublayer == "self_attn":
                    y = self._attention(index, x, past[attending.index(index)], lengths, tables)
                else:
                    y = self._mlp(f"{name}.mlp", x)
                y = self._norm(y, f"{name}.{after}") if after else y
                output = self._scaled(y, self.family.residual_scale(config), f"{name}.{sublayer}.scaled")
                entered = f"{name}.attended"
            entered = block_output(index) if entered == f"{name}.attended" else entered
        normed, _ = self._add_and_norm(residual, output, "model.norm", entered)

        # Declared as one position: GenAI allocates what the shape says, and would allocate the prompt's length for a symbolic one.
        b.output(self._head(last_positions(b, normed)), "logits", b.float, ["batch_size", 1, config.vocab_size])
        for index, node in enumerate(n for n in b.nodes if n.op_type == "GroupQueryAttention"):
            for value, part in zip(node.outputs[1:], parts, strict=True):
                b.output(value, f"present.{index}.{part}", b.float, self._cache_shape("total_sequence_length"))
        return b.model({"edgepress.exporter": "fused", "edgepress.shared_cache": "1", "edgepress.batch": "right-padded"})

    # ------------------------------------------------------------------------------------------------ what layers share

    def _lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Inputs of GroupQueryAttention: int32 lengths (batch,) minus one, and the longest length.

        The operator counts a row's tokens and takes them for its first ones. A row that begins with padding would get wrong text
        without a word, so the one that is subtracted is looked up in a table that has none for it.
        """
        b = self.b
        lengths = b.op("ReduceSum", [mask, b.integers(1)], "mask.length", keepdims=0)
        first = b.op("Gather", [mask, b.constant("int64_0", np.array(0))], "mask.first", axis=1)
        one = b.op("Gather", [b.integers(1), b.op("Sub", [b.integers(1), first], "mask.padded")], PADDED_ON_THE_LEFT)
        last = b.op("Cast", [b.op("Sub", [lengths, one], "mask.last")], "mask.seqlens_k", to=INT32)
        total = b.op("Gather", [b.op("Shape", [mask], "mask.shape"), b.constant("int64_1", np.array(1))], "mask.total")
        return last, b.op("Cast", [total], "mask.total_sequence_length", to=INT32)

    def _tables(self, layers: list[int]) -> dict[str | None, list[ir.Value | None]]:
        """Cosines and sines for each kind of rotary embedding, and none for layers without positions."""
        tables: dict[str | None, list[ir.Value | None]] = {None: [None, None]}
        for kind, (cos, sin) in rotary_tables(self.config, layers).items():
            suffix = f".{kind}" if kind else ""
            tables[kind] = rotary_values(self.b, suffix, cos, sin)
        return tables

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.config.num_key_value_heads, length, head_size(self.config)]

    # -------------------------------------------------------------------------------------------------------- sublayers

    def _attention(
        self,
        index: int,
        x: ir.Value,
        past: list[ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        tables: dict[str | None, list[ir.Value | None]],
    ) -> ir.Value:
        b, config, kind = self.b, self.config, rotary_kind(self.config, index)
        name = f"model.layers.{index}.self_attn"
        qkv = self._linear([f"{name}.{part}" for part in self.family.qkv()], f"{name}.qkv_proj", x)
        attended = b.op(
            "GroupQueryAttention",
            [*(self._normed_qk(name, qkv) if self.family.qk_norm else [qkv, None, None]), *past, *lengths, *tables[kind]],
            name,
            [name, *(value.name.replace("past_key_values", "present") for value in past)],
            DOMAIN,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=self.family.attention_scale(config),
            softcap=self.family.attention_softcap(config),
            local_window_size=window(config, index),
            do_rotary=int(kind is not None),
            rotary_interleaved=0,
        )
        return self._linear([f"{name}.o_proj"], f"{name}.o_proj", attended)

    def _normed_qk(self, name: str, qkv: ir.Value) -> list[ir.Value]:
        """Query, key and value as three values, the first two normalized: the operator does that itself on CUDA only."""
        b, size = self.b, head_size(self.config)
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.num_key_value_heads)
        names = [f"{name}.{part}" for part in ("query", "key", "value")]
        b.op("Split", [qkv, b.integers(*(n * size for n in heads))], f"{name}.split", names, axis=-1)
        parts = list(b.nodes[-1].outputs)
        for i, (part, count) in enumerate((("q", heads[0]), ("k", heads[1]))):
            if self.family.qk_norm == "width":
                parts[i] = self._norm(parts[i], f"{name}.{part}_norm")
            else:
                by_head = b.op("Reshape", [parts[i], b.integers(0, 0, count, size)], f"{name}.{part}_heads")
                normed = self._norm(by_head, f"{name}.{part}_norm")
                parts[i] = b.op("Reshape", [normed, b.integers(0, 0, count * size)], f"{name}.{part}_normed")
        return parts

    def _mlp(self, name: str, x: ir.Value) -> ir.Value:
        b, activation = self.b, getattr(self.config, self.family.activation)
        both = self._linear([f"{name}.{part}" for part in self.family.gate_up()], f"{name}.gate_up_proj", x)
        gate = b.op("Split", [both], f"{name}.split", [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
        up = b.nodes[-1].outputs[1]
        if activation == "silu":  # onnxruntime makes one kernel of these two
            active = b.op("Mul", [gate, b.op("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        else:
            active = b.op("Gelu", [gate], f"{name}.gelu", approximate="none" if activation == "gelu" else "tanh")
        return self._linear([f"{name}.down_proj"], f"{name}.down_proj", b.op("Mul", [active, up], f"{name}.mul"))

    def _linear(self, modules: list[str], name: str, x: ir.Value) -> ir.Value:
        """The modules' outputs for one input, concatenated: one MatMul where their layouts allow, else several and a Concat."""
        b, weights = self.b, self.weights
        matrices = [self.matrix(module) for module in modules]
        packed = [matrix for matrix in matrices if isinstance(matrix, PackedLinear)]
        if not packed:
            y = b.linear(x, np.concatenate([m for m in matrices if isinstance(m, np.ndarray)]), name, self.accuracy_level)
        elif len(packed) == len(matrices) and (whole := stacked(name, packed)) is not None:
            y = b.linear(x, whole, name, self.accuracy_level)
        else:
            parts = [b.linear(x, matrix, module, self.accuracy_level) for module, matrix in zip(modules, matrices, strict=True)]
            y = b.op("Concat", parts, name, axis=-1)
        if not any(f"{module}.bias" in weights for module in modules):
            return y
        bias = [
            weights.array(f"{module}.bias") if f"{module}.bias" in weights else np.zeros(matrix.shape[0], np.float32)
            for module, matrix in zip(modules, matrices, strict=True)
        ]
        return b.op("Add", [y, b.constant(f"{name}.bias", np.concatenate(bias))], f"{name}.biased")

    # --------------------------------------------------------------------------------------- norms, scales, both ends

    def _add_and_norm(self, residual: ir.Value, output: ir.Value | None, norm: str | None, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm(residual + output), residual + output); without a norm both are the sum. name: of the sum."""
        if output is None:
            return (self._norm(residual, norm) if norm else residual), residual
        if norm is None:
            added = self.b.op("Add", [residual, output], name)
            return added, added
        inputs, attributes = [residual, output, self._norm_weight(norm)], {"epsilon": self.config.rms_norm_eps}
        normed = self.b.op("SkipSimplifiedLayerNormalization", inputs, norm, [norm, "", "", name], DOMAIN, **attributes)
        return normed, self.b.nodes[-1].outputs[3]

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        attributes = {"axis": -1, "epsilon": self.config.rms_norm_eps, "stash_type": 1}
        return self.b.op("SimplifiedLayerNormalization", [x, self._norm_weight(name)], name, **attributes)

    def _norm_weight(self, name: str) -> ir.Value:
        weight = self.weights.array(f"{name}.weight") + np.float32(self.family.norm_offset)
        if name == "model.norm":  # scaling the logits here costs nothing
            weight = weight * np.float32(self.family.logits_scale(self.config))
        return self.b.constant(f"{name}.weight", weight)

    def _scaled(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        if factor == 1:
            return x
        return self.b.op("Mul", [x, self.b.constant(f"float.{factor:.9g}", np.array(factor, np.float32))], name)

    def _head(self, x: ir.Value) -> ir.Value:
        """Logits; a matrix tied to the embedding is stored once."""
        b, config = self.b, self.config
        name = EMBEDDING if config.tie_word_embeddings or "lm_head.weight" not in self.weights else "lm_head"
        matrix = self.matrix(name)
        if isinstance(matrix, PackedLinear):
            scores = b.linear(x, matrix, "lm_head", self.accuracy_level, weight_name=name)
        else:  # Gemm reads the matrix as (vocabulary, hidden), as Gather does
            flat = b.op("Reshape", [x, b.integers(-1, config.hidden_size)], "lm_head.rows")
            scores = b.op("Gemm", [flat, b.constant(f"{name}.weight", matrix)], "lm_head", transB=1)
            shape = b.op("Shape", [x], "lm_head.leading", start=0, end=2)
            shape = b.op("Concat", [shape, b.integers(config.vocab_size)], "lm_head.shape", axis=0)
            scores = b.op("Reshape", [scores, shape], "lm_head.scores")
        if cap := self.family.logits_softcap(config):
            scores = b.op("Tanh", [self._scaled(scores, 1 / cap, "lm_head.by_cap")], "lm_head.tanh")
            scores = self._scaled(scores, cap, "lm_head.capped")
        return scores
