"""The portable graph: any decoder that transformers has, traced in float, its matrices then replaced by the packed ones.

A quantized module cannot be traced. So the float model is, with dequantized weights, and every MatMul that reads a
packed weight becomes the operator that carries its codes.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from edgepress.exporters.graph.builder import LAST, Builder
from edgepress.exporters.graph.builder import block_output as name_of_block_output
from edgepress.exporters.graph.operators import DOMAIN
from edgepress.models.families import FAMILIES, PARTS
from edgepress.models.rotary import GROWING, switches
from edgepress.pipeline.checkpoint.blocks import block_output, decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import reason_of
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.parts import within
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.runtime.decoder import SWITCHES
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from transformers import DynamicCache, PreTrainedModel


class _Flat(torch.nn.Module):
    """The model with its cache as a flat list of tensors, and positions counted from the attention mask.

    After logits and cache it returns the output of each block, so that the graph can name it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[torch.Tensor] = []
        self.blocks: Sequence[torch.nn.Module] = []
        with suppress(ModelError):
            self.blocks = list(decoder_blocks(model)[1])

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the context every forward collects the blocks' outputs in ``outputs``."""
        handles = [block.register_forward_hook(self._collect) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, module: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.outputs.append(block_output(output))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        self.outputs.clear()
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        # Padding on the left has no positions.
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        settings = {"attention_mask": attention_mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        output = self.model(input_ids=input_ids, **settings)
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present, *self.outputs


def build(checkpoint: Checkpoint, model: PreTrainedModel, accuracy_level: int, builder: Builder) -> ir.Model:
    """Trace the checkpoint's float32 model and put the packed weights in.

    builder: an empty one, of the type that weights, activations and cache have; for float16 a copy of the
    model is traced. Raises ModelError for what cannot be traced, or when the traced graph does not read a packed matrix.
    """
    if builder.float == ir.DataType.FLOAT16:
        model = copy.deepcopy(model)
        for parameter in model.parameters():  # buffers stay: rotary frequencies lose too much in half precision
            parameter.data = parameter.data.half()
    if any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters()):
        model.set_experts_implementation("batched_mm")  # the default has no ONNX operator
    with _without_parts(model, checkpoint.silent), _fixed_frequencies(model):
        past = _sample_cache(model, bool(checkpoint.silent))
        traced = _trace(_Flat(model), past)
    _keep_last_positions(traced.graph)
    _put_packed_in(traced.graph, checkpoint, model, accuracy_level, builder)
    onnxscript.optimizer.optimize_ir(traced)
    del traced.graph.outputs[1 + len(past) :]  # the blocks' outputs keep their names, for exporters/proof/mismatch.py
    # The tracer notes the Python stack on every node: on a small model that outweighs the weights.
    ClearMetadataAndDocStringPass()(traced)
    traced.metadata_props.update(
        {"edgepress.exporter": "portable", "edgepress.shared_cache": "0", "edgepress.batch": "left-padded"}
    )
    if changes := switches(checkpoint.config):
        traced.metadata_props[SWITCHES] = ",".join(map(str, changes))
    return traced


def _sample_cache(model: PreTrainedModel, fewer: bool) -> list[torch.Tensor]:
    """Keys and values (2, heads, 2, head size) of every layer in turn, as the model itself makes them. Raises ModelError.

    fewer: some layers lack attention, and their caches, the last ones, are never filled.
    """
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if layer.is_initialized] if fewer else cache.layers
    if not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise ModelError(
            "some layers keep a state other than keys and values (linear attention), which cannot be exported yet; "
            "choose another model"
        )
    return [tensor.expand(2, *tensor.shape[1:]).contiguous() for layer in layers for tensor in (layer.keys, layer.values)]


class _Nothing(torch.nn.Module):
    """What stands for a silent part: a zero; ``attention``: as attention returns it, with weights that nobody reads."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        nothing = hidden_states.new_zeros(1, 1, 1)
        return (nothing, None) if self.attention else nothing


@contextmanager
def _without_parts(model: PreTrainedModel, silent: Collection[str]) -> Iterator[None]:
    """Within the context silent parts compute nothing, and the attention that is left numbers its caches without gaps."""
    if not silent:
        yield
        return
    attention, family = PARTS["attention"].module, FAMILIES[model.config.model_type]
    left = [module for name, module in model.named_modules() if name.endswith(f".{attention}") and name not in silent]
    numbers = [module.layer_idx for module in left]
    replaced: dict[str, torch.nn.Module] = {name: _Nothing(name.endswith(f".{attention}")) for name in silent}
    for name in silent:  # the norms on its two ends have nothing to do
        block, _, part = name.rpartition(".")
        norms = next((before, after) for sublayer, before, after in family.sublayers() if sublayer == part)
        replaced |= {f"{block}.{norm}": torch.nn.Identity() for norm in norms if norm}
    former = {name: model.get_submodule(name) for name in replaced}
    for name, module in replaced.items():
        model.set_submodule(name, module)
    for number, module in enumerate(left):
        module.layer_idx = number
    try:
        yield
    finally:
        for name, module in former.items():
            model.set_submodule(name, module)
        for number, module in zip(numbers, left, strict=True):
            module.layer_idx = number


@contextmanager
def _fixed_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Rotary embeddings that grow beyond the context keep the frequencies they have within it, where the artifact ends."""
    growing = [m for m in model.modules() if getattr(m, "rope_type", None) == GROWING]
    for module in growing:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module in growing:
            module.rope_type = GROWING


def _trace(flat: _Flat, past: list[torch.Tensor]) -> ir.Model:
    """The ONNX graph of a float model, not optimized; its inputs and outputs have their final names. Raises ModelError."""
    parts = [f"{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    batch, tokens, total = (torch.export.Dim(n) for n in ("batch_size", "sequence_length", "total_sequence_length"))
    earlier = torch.export.Dim("past_sequence_length", min=0)
    # Sample sizes all differ, and from 1, so that the tracer takes none of them for a constant or for another.
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    with warnings.catch_warnings(), flat.hooked(), _one_line_errors():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            flat,
            (ids, mask, past),
            dynamo=True,
            verbose=False,
            optimize=False,  # it would fold small weights into constants without a name; done after the packed ones are in
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)],
            output_names=[
                "logits",
                *(f"present.{part}" for part in parts),
                *(name_of_block_output(i) for i in range(len(flat.blocks))),
            ],
            dynamic_shapes={
                "input_ids": {0: batch, 1: tokens},
                "attention_mask": {0: batch, 1: total},
                "past": [{0: batch, 2: earlier}] * len(past),
            },
        )
    assert program is not None
    return program.model


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What torch.onnx.export cannot trace ends in one line instead of hundreds. Raises ModelError."""
    # The first warns that torchvision is not installed, the second of what follows as an error.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # torch prints the whole graph of what it cannot trace
            yield
    except Exception as error:  # the tracer's errors share no base class
        raise ModelError(f"this architecture cannot be traced to ONNX ({reason_of(error)}); choose another model") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _put_packed_in(graph: ir.Graph, checkpoint: Checkpoint, model: PreTrainedModel, accuracy_level: int, builder: Builder) -> None:
    """Let every MatMul, Gemm (GPT-2's Conv1D) and Gather over a packed weight read its codes instead."""
    weights = checkpoint.weights
    packed_names, done = {name for name in weights.matrices if not within(checkpoint.silent, name)}, set[str]()
    # The tracer keeps one name of a tied matrix, and it may be the head's.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    alias = {names[head]: names[embedding]} if head.weight is embedding.weight else {}
    for node in list(graph):
        if node.op_type not in ("MatMul", "Gemm", "Gather"):
            continue
        source = _weight_name(node.inputs[0 if node.op_type == "Gather" else 1])
        if source is None:
            continue
        module = source.removeprefix("model.").removesuffix(".weight")
        if module not in packed_names:
            module = alias.get(module, module)
        if (packed := weights.packed(module)) is None:
            continue
        done.add(module)
        _replace(graph, node, packed, builder, module, accuracy_level)
    if packed_names - done:
        raise ModelError(
            f"the traced graph does not read {min(packed_names - done)}; this architecture cannot be exported packed yet, "
            "export its float checkpoint"
        )
    for value in builder.initializers.values():
        graph.register_initializer(value)
    graph.outputs[0].name = "logits"
    graph.opset_imports[DOMAIN] = 1
    _drop_unused(graph)


def _replace(graph: ir.Graph, node: ir.Node, packed: PackedLinear, builder: Builder, module: str, accuracy_level: int) -> None:
    """Put the operators that read a packed matrix in the place of one node."""
    builder.nodes = []
    if node.op_type == "Gather":
        value = builder.embedding(node.inputs[1], packed, module)
    else:
        value = builder.linear(node.inputs[0], packed, f"{module}.matmul", accuracy_level, module)
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            value = builder.op("Add", [value, node.inputs[2]], f"{module}.biased")
    value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, builder.nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _weight_name(value: ir.Value | None) -> str | None:
    """The initializer behind a MatMul's second input, directly or through one Transpose."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Transpose":
        value = node.inputs[0]
    return value.name if value is not None and value.is_initializer() else None


def _keep_last_positions(graph: ir.Graph) -> None:
    """Cut the hidden states before the head to the last ``logits_to_keep`` positions (see builder.last_positions)."""
    logits = graph.outputs[0]
    head = logits.producer()
    while head is not None and head.op_type not in ("MatMul", "Gemm"):  # scaling or capping of the logits may follow
        head = next((v.producer() for v in head.inputs if v is not None and v.producer() is not None), None)
    if head is None or head.op_type != "MatMul" or _weight_name(head.inputs[1]) is None:
        raise ModelError(
            "the traced graph does not end in a matrix of logits; this architecture cannot be exported yet, choose another"
        )
    keep = ir.Value(name="logits_to_keep", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    keep.const_value = ir.Tensor(np.array([1], dtype=np.int64), name="logits_to_keep")
    graph.register_initializer(keep)
    graph.inputs.append(keep)
    bounds = []
    for name, number in (("head.end", LAST), ("head.axis", 1)):
        value = ir.Value(name=name, const_value=ir.Tensor(np.array([number], dtype=np.int64), name=name))
        graph.register_initializer(value)
        bounds.append(value)
    start = ir.node("Neg", [keep], name="head.start")
    last = ir.node("Slice", [head.inputs[0], start.outputs[0], *bounds], name="head.positions")
    last.outputs[0].type = head.inputs[0].type
    graph.insert_before(head, [start, last])
    head.replace_input_with(0, last.outputs[0])
    head.outputs[0].shape = None
    vocabulary = logits.shape[-1] if logits.shape is not None else None
    logits.shape = ir.Shape(["batch_size", 1, vocabulary])


def _drop_unused(graph: ir.Graph) -> None:
    """Drop the Transposes and float weights that nothing reads any more."""
    for node in reversed(list(graph)):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.inputs:
            del graph.initializers[name]
