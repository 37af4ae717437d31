"""The artifact computes what the checkpoint computes, holds the quantizer's bits, and runs in its consumers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from edgepress.exporters.graph.operators import operator, stacked
from edgepress.exporters.proof import parity
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows
from families import TINY
from onnxruntime.quantization import quantize_dynamic
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from .conftest import Made

IN_PROCESS = [name for name, row in METHODS.items() if not row.isolated]
CASES = [(name, "fused") for name in IN_PROCESS] + [("rtn", "portable")]


SLOW = [pytest.param(name, "portable", marks=pytest.mark.families) for name in IN_PROCESS if name != "rtn"]


@pytest.mark.parametrize(("method", "exporter"), [*CASES, *SLOW])
def test_parity_with_the_dequantized_checkpoint(
    method: str, exporter: str, make: Callable[..., Made], tiny: Path, shallow: Path
) -> None:
    """Whole, in chunks, token by token; and every proof is in the manifest."""
    _, exported = make(shallow if exporter == "portable" else tiny, method, exporter)
    facts = exported.steps[-1].facts
    assert facts["exporter"] == exporter
    exact = facts["parity"][0]
    assert exact["accuracy_level"] == 0 and exact["tokens"] >= parity.PROOF_TOKENS
    assert max(exact["difference_whole"], exact["difference_chunks"], exact["difference_steps"]) < parity.TOLERANCE
    assert exact["greedy_match_tokens"] == parity.GREEDY_TOKENS and exact["top1_agreement"] == 1


def test_the_quantizers_integers_ship_bit_for_bit(fused: Made) -> None:
    """Codes, scales and zero points in model.onnx.data are those of packed.safetensors, rows of q, k, v in order."""
    packed, exported = fused
    file, graph = PackedFile(packed.path), ir.load(exported.path / "model.onnx").graph
    names = list(file)
    for index in range(4):
        layer = f"model.layers.{index}"
        for name, parts in (
            (f"{layer}.self_attn.qkv_proj", [f"{layer}.self_attn.{x}_proj" for x in "qkv"]),
            (f"{layer}.mlp.gate_up_proj", [f"{layer}.mlp.{x}_proj" for x in ("gate", "up")]),
            (f"{layer}.self_attn.o_proj", [f"{layer}.self_attn.o_proj"]),
            (f"{layer}.mlp.down_proj", [f"{layer}.mlp.down_proj"]),
        ):
            whole = stacked(name, [file[part] for part in parts])
            assert whole is not None
            for kind, array in operator(whole, 4)[1].items():
                value = graph.initializers[f"{name}.{kind}"].const_value
                assert value is not None and np.array_equal(value.numpy(), array)
            names = [n for n in names if n not in parts]
    for name in ("lm_head", "model.embed_tokens"):
        end = operator(file[name], 4)[1]
        for kind, array in end.items():  # the embedding's codes are stored in the shape that its rows are read in
            assert np.array_equal(graph.initializers[f"{name}.{kind}"].const_value.numpy().reshape(array.shape), array)
    assert sorted(names) == ["lm_head", "model.embed_tokens"]


def test_artifact_holds_what_consumers_need(fused: Made) -> None:
    names = {file.name for file in fused[1].path.iterdir()}
    assert read_json(fused[1].path / "config.json").items() >= {"torch_dtype": "float32", "rope_theta": 10000.0}.items()
    required = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json", "tokenizer.json"}
    assert required | {"tokenizer_config.json", "manifest.json"} <= names
    assert not {name for name in names if name.startswith("parity") or name.endswith(".safetensors")}
    graph = ir.load(fused[1].path / "model.onnx").graph
    assert [v.name for v in graph.inputs][:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert [v.name for v in graph.outputs][:3] == ["logits", "present.0.key", "present.0.value"]


def test_genai_generates_the_same_tokens(fused: Made, text: Path) -> None:
    """onnxruntime-genai reads the folder as it is."""
    import onnxruntime_genai as og

    folder = fused[1].path
    ids = text_windows(text, folder, budget=30, length=30)[0]
    decoder = Decoder(folder)
    reference = list(decoder.greedy(ids, 20))
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 20, min_length=len(ids) + 20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    generated = []
    while not generator.is_done():
        generator.generate_next_token()
        generated.append(int(generator.get_next_tokens()[0]))
    assert generated == reference


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])
def test_quantize_dynamic_takes_the_float_graph(exporter: str, make: Callable[..., Made], tiny: Path, tmp_path: Path) -> None:
    """Trap 13: it fails on a graph that declares the shapes of its weights, as onnx_ir writes them by itself."""
    _, exported = make(tiny, "none", exporter)
    file = exported.path / "model.onnx"
    graph = onnx.load(file, load_external_data=False).graph
    assert not {tensor.name for tensor in graph.initializer} & {value.name for value in graph.value_info}
    quantize_dynamic(file, tmp_path / "int8.onnx", extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    ort.InferenceSession(tmp_path / "int8.onnx")


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**TINY, sliding_window=7, tie_word_embeddings=False),
        Qwen2Config(**TINY, tie_word_embeddings=True),
        Qwen2Config(**TINY, use_sliding_window=True, sliding_window=9, max_window_layers=2, tie_word_embeddings=True),
        LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, head_dim=32),
        LlamaConfig(
            **TINY,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["mistral-window", "qwen2", "qwen2-window", "llama-biases", "llama3-rope"],
)  # fmt: skip
def test_llama_relatives_get_the_fused_graph(
    config: PreTrainedConfig, random_model: Callable[..., Path], make: Callable[..., Made], tmp_path: Path
) -> None:
    """Windows, biases, tied heads and scaled rotary embeddings; the stage fails unless parity holds."""
    _, exported = make(random_model(config, tmp_path / "model"), "rtn")
    assert exported.steps[-1].facts["exporter"] == "fused"


def test_a_head_size_that_the_fused_operator_refuses_falls_back_and_says_so(
    random_model: Callable[..., Path], make: Callable[..., Made], tmp_path: Path
) -> None:
    """GroupQueryAttention takes multiples of 16 only; asked for by name, the fused graph is refused."""
    folder = random_model(LlamaConfig(**{**TINY, "num_hidden_layers": 1}, head_dim=8, tie_word_embeddings=True), tmp_path / "model")
    _, exported = make(folder, "rtn")
    assert exported.steps[-1].facts["exporter"] == "portable"
    assert "head size 8" in exported.steps[-1].facts["not_fused_because"]
    with pytest.raises(OptionError, match="head size 8"):
        make(folder, "rtn", "fused")


@pytest.mark.families
def test_portable_graph_reads_a_left_padded_batch(make: Callable[..., Made], shallow: Path, text: Path) -> None:
    """Two prompts of unequal length in one batch give the logits that each gives alone."""
    import onnxruntime

    packed, exported = make(shallow, "none", "portable")
    session = onnxruntime.InferenceSession(exported.path / "model.onnx", providers=["CPUExecutionProvider"])
    long = text_windows(text, packed.path, budget=24, length=24)[0]
    short = long[:11]
    ids = np.zeros((2, 24), dtype=np.int64)
    ids[0], ids[1, 13:] = long, short
    mask = np.ones((2, 24), dtype=np.int64)
    mask[1, :13] = 0
    past = {v.name: np.zeros((2, 2, 0, 16), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0][:, -1]
    model = load_model(packed.path)
    with torch.inference_mode():
        for row, prompt in zip(logits, (long, short), strict=True):
            reference = model(torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
            assert np.abs(row - reference).max() < 1e-3 * reference.std()
