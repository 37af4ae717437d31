"""The artifact computes what the checkpoint computes, holds the quantizer's bits, and runs in its consumers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from edgepress.exporters.configs import with_v4_keys, with_v4_tokenizer
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import rows_in_place
from edgepress.exporters.graph.operators import DOMAIN, operator, stacked
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.offloaded import offloaded_model
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.errors import ModelError, OptionError, ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import ExportOptions, QuantizeOptions, VerifyOptions
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.runtime import decoder as runtime
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer, text_windows
from edgepress.pipeline.verify.checks import verify
from onnxruntime.quantization import quantize_dynamic
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from .conftest import TINY

Made = tuple[Artifact, Artifact]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[..., Made]:
    """(quantized, exported) of a checkpoint folder."""

    @cache
    def run(source: Path, method: str, exporter: str = "auto") -> Made:
        folder = tmp_path_factory.mktemp("made")
        options = QuantizeOptions(method=method, group_size=None if method in ("nf4", "fp4") else 32)
        packed = stages.run("quantize", Artifact.load(source), folder / "packed", options)
        exported = stages.run("export", packed, folder / "onnx", ExportOptions(exporter=exporter, text=text))
        return packed, exported

    return run


@pytest.fixture(scope="module")
def fused(make: Callable[..., Made], tiny: Path) -> Made:
    return make(tiny, "rtn")


CASES = [(m, "fused") for m in ("none", "rtn", "nf4", "fp4", "int8")] + [("rtn", "portable")]
SLOW = [pytest.param(m, "portable", marks=pytest.mark.families) for m in ("none", "nf4", "fp4", "int8")]


@pytest.mark.parametrize(("method", "exporter"), [*CASES, *SLOW])
def test_parity_with_the_dequantized_checkpoint(method: str, exporter: str, make: Callable[..., Made], tiny: Path) -> None:
    """Whole, in chunks, token by token; and every proof is in the manifest."""
    _, exported = make(tiny, method, exporter)
    facts = exported.steps[-1].facts
    assert facts["exporter"] == exporter
    exact = facts["parity"][0]
    assert exact["accuracy_level"] == 0 and exact["tokens"] >= parity.PROOF_TOKENS
    assert max(exact["difference_whole"], exact["difference_chunks"], exact["difference_steps"]) < parity.TOLERANCE
    assert exact["greedy_match_tokens"] == parity.GREEDY_TOKENS and exact["top1_agreement"] == 1


@pytest.mark.parametrize("tied", [True, False])
def test_rows_and_matrix_are_the_same_bytes(tied: bool, tmp_path: Path) -> None:
    """A tied matrix is on the disk once and the embedding a view of it: no Reshape that onnxruntime would fold into a copy."""
    weight = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    matrix = round_to_nearest("table", weight, 4, 32, False)
    b = Builder()
    hidden = b.embedding(b.input("ids", ir.DataType.INT64, ["n"]), matrix, "table")
    result = b.linear(hidden, matrix, "head", 0, weight_name="table") if tied else hidden
    b.output(result, "out", ir.DataType.FLOAT, ["n", 512 if tied else 64])
    ir.save(b.model({}), tmp_path / "model.onnx", external_data="model.onnx.data")
    graph = rows_in_place(tmp_path / "model.onnx").graph
    assert [n.op_type for n in graph] == ["GatherBlockQuantized", "MatMulNBits"][: 1 + tied]
    if tied:
        assert graph.initializers["table.B.rows"].const_value.offset == graph.initializers["table.B"].const_value.offset
    assert (tmp_path / "model.onnx.data").stat().st_size < 1.5 * matrix.nbytes
    ids = np.array([3, 500, 3])
    found = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": ids})[0]
    expected = matrix.dequantized()[ids]
    assert np.allclose(found, expected @ matrix.dequantized().T if tied else expected, atol=1e-4)


@pytest.mark.parametrize("method", ["none", "rtn", "nf4"])
def test_a_streamed_model_is_the_loaded_one(method: str, make: Callable[..., Made], tiny: Path) -> None:
    """The proof's reference holds one matrix at a time, and its logits are the whole model's, bit for bit."""
    folder = make(tiny, method)[0].path
    ids = torch.arange(40)[None]
    streamed, whole = offloaded_model(folder), load_model(folder)
    with torch.inference_mode():
        for _ in range(2):  # what one forward drops the next finds again
            assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits)
            assert all(parameter.device.type == "meta" for parameter in streamed.parameters())


def test_a_large_matrix_is_dequantized_by_parts() -> None:
    """More rows than are dequantized at a time, the last part short, with zero points and with a permutation."""
    weight = np.random.default_rng(0).normal(size=(9000, 32)).astype(np.float32)
    whole = round_to_nearest("m", weight, 4, 32, False)
    assert np.abs(whole.dequantized() - weight).max() <= whole.scales.max() * 0.51
    order = np.random.default_rng(1).permutation(32).astype(np.int32)
    assert np.array_equal(replace(whole, permutation=order).dequantized()[:, order], whole.dequantized())


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
            for kind, wanted in operator(whole, 4)[1].items():
                value = graph.initializers[f"{name}.{kind}"].const_value
                assert value is not None and np.array_equal(value.numpy(), wanted)
            names = [n for n in names if n not in parts]
    for name in ("lm_head", "model.embed_tokens"):
        end = operator(file[name], 4)[1]
        for kind, wanted in end.items():  # the embedding's codes are stored in the shape that its rows are read in
            assert np.array_equal(graph.initializers[f"{name}.{kind}"].const_value.numpy().reshape(wanted.shape), wanted)
    assert sorted(names) == ["lm_head", "model.embed_tokens"]


def test_a_wrong_bit_is_caught(fused: Made, text: Path, tmp_path: Path) -> None:
    """The proof must fail for an artifact that differs in one scale: a proof that passes everything proves nothing."""
    packed, exported = fused
    for file in exported.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = ir.load(tmp_path / "model.onnx")
    value = graph.graph.initializers["model.layers.1.mlp.down_proj.scales"]
    assert value.const_value is not None
    scales = value.const_value.numpy().copy()
    scales[3, 0] *= 1.5
    value.const_value = ir.Tensor(scales, name=value.name)
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    windows = text_windows(text, packed.path, budget=512, length=200)
    with pytest.raises(ProofError, match="differs from the checkpoint"):
        parity.prove(ReferenceLogits(load_model(packed.path), windows, tmp_path), tmp_path, graph)


def test_another_most_likely_token_is_no_proof(
    make: Callable[..., Made], tiny: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """However near the logits are, but for ties: here two are exchanged at one position, by a hundredth of what may differ."""
    packed, exported = make(tiny, "none")
    windows, feed = text_windows(text, packed.path, budget=120, length=40), Decoder.feed
    wanted = ReferenceLogits(load_model(packed.path), windows, tmp_path)
    truth = wanted.logits(windows[1]).copy()
    first, second = np.argsort(truth[7])[::-1][:2]

    def exchanged(gap: float) -> parity.Parity:
        truth[7, second] = truth[7, first] - gap * wanted.spread
        np.save(next(tmp_path.glob(f"{hashlib.sha256(windows[1].tobytes()).hexdigest()}*")), truth)
        changed = truth[7, [second, first]]

        def swapped(self: Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
            found = feed(self, ids, keep)
            if np.array_equal(ids, windows[1]):
                found[7, [first, second]] = changed
            return found

        monkeypatch.setattr(Decoder, "feed", swapped)
        return parity.measure(wanted, lambda: Decoder(exported.path), 0)

    assert exchanged(0.1 * parity.TIE).flipped == 0
    found = exchanged(5 * parity.TIE)
    assert found.flipped == 1 and "1 of 124 positions have another most likely token" in parity.faults(found, half=False)


def test_torch_and_onnxruntime_take_turns(fused: Made, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the proof and in `verify`: no session is open while torch computes, and between its turns torch holds no weight."""
    packed, exported = fused
    models, decoders, torch_ran, init = [], WeakSet(), [], Decoder.__init__

    def streamed(self: Checkpoint) -> object:
        models.append(offloaded_model(self.path))
        return models[-1]

    def opened(self: Decoder, *arguments: Any, **settings: Any) -> None:
        assert not [name for model in models for name, parameter in model.named_parameters() if not parameter.is_meta]
        init(self, *arguments, **settings)
        decoders.add(self)

    def computed(model: Any, ids: np.ndarray) -> np.ndarray:
        assert not decoders
        torch_ran.append(len(ids))
        return logits_of(model, ids)

    monkeypatch.setattr(Checkpoint, "offloaded_model", streamed)
    for module in ("proof.reference", "proof.parity"):
        monkeypatch.setattr(f"edgepress.exporters.{module}.logits_of", computed)
    monkeypatch.setattr(Decoder, "__init__", opened)
    stages.run("export", packed, tmp_path / "onnx", ExportOptions(exporter="fused", text=text))
    windows = len(parity.proof_windows(text, packed.path))
    assert len(models) == 1 and len(torch_ran) == windows + 2 + 2  # two rows of a batch, and greedy tokens at both levels
    assert not list((tmp_path / "onnx").glob("proof*"))
    (check,) = [c for c in verify(exported.path, VerifyOptions(original=packed.path, text=text)) if c.name == "parity"]
    assert check.state == "ok" and len(models) == 2, check.detail


def test_tokens_one_by_one_from_as_many_windows_as_it_takes(fused: Made, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    packed, exported = fused
    windows, feed, single = text_windows(text, packed.path, budget=100, length=20), Decoder.feed, []

    def counted(self: Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        single.append(len(ids) == 1 and keep == 0)
        return feed(self, ids, keep)

    monkeypatch.setattr(Decoder, "feed", counted)
    parity.measure(ReferenceLogits(load_model(packed.path), windows, tmp_path), lambda: Decoder(exported.path), 0)
    assert sum(single) == parity.STEPS + len(windows)  # the chunks hold one of one token a window


@pytest.mark.parametrize(("tokens", "whole", "rest"), [(500, 2, True), (690, 3, False), (5000, 3, True)])
def test_what_the_proof_reads(tokens: int, whole: int, rest: bool, tiny: Path, text: Path, tmp_path: Path) -> None:
    """All of a short text, at least 512 tokens of a longer one but no short rest; greedy tokens fit into the context."""
    ids = text_windows(text, tiny, budget=tokens, length=tokens + 1)[0]
    (tmp_path / "text.txt").write_text(load_tokenizer(tiny).decode(ids.tolist()))
    lengths = [len(window) for window in parity.proof_windows(tmp_path / "text.txt", tiny)]
    assert lengths[:whole] == [256 - parity.GREEDY_TOKENS] * whole and len(lengths) == whole + rest
    assert sum(lengths) >= min(tokens, parity.PROOF_TOKENS) and min(lengths) >= 32


def test_a_context_too_short_for_a_proof(tiny: Path, text: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    with pytest.raises(ModelError, match="33 tokens is too short for the proof of an export, it takes 40"):
        parity.proof_windows(text, tmp_path)


def test_one_file_gives_last_or_all_positions(fused: Made, text: Path) -> None:
    """logits_to_keep: 1 by default, 0 is all; a consumer that does not know it never sees it."""
    decoder = Decoder(fused[1].path)
    ids = text_windows(text, fused[1].path, budget=40, length=40)[0]
    every = decoder.feed(ids, keep=0)
    decoder.reset()
    last = decoder.feed(ids)
    assert every.shape == (len(ids), 5120) and last.shape == (1, 5120)
    assert np.allclose(every[-1], last[0], atol=1e-5)
    assert "logits_to_keep" not in [value.name for value in decoder.session.get_inputs()]


def test_the_shared_cache_grows(fused: Made, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that outgrows its buffer, token by token and by pieces, computes what one piece computes."""
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 32)
    ids = text_windows(text, fused[1].path, budget=200, length=200)[0]
    whole = Decoder(fused[1].path).feed(ids, keep=0)
    decoder = Decoder(fused[1].path)
    pieces = [decoder.feed(piece, keep=0) for piece in np.split(ids, [30, *range(31, 70), 150])]
    assert 200 <= decoder._capacity <= decoder.context
    assert np.allclose(whole, np.concatenate(pieces), atol=0.2 * whole.std())  # int8 activations round differently


@pytest.mark.parametrize("capacity", [40, 256])
def test_the_cache_forgets_on_reset(fused: Made, text: Path, capacity: int) -> None:
    """A sequence must not see the one before it, whatever the size of the shared buffer."""
    decoder = Decoder(fused[1].path)
    assert decoder.shared
    ids = text_windows(text, fused[1].path, budget=80, length=40)
    decoder.reset(capacity)
    first = decoder.feed(ids[0], keep=0)
    decoder.reset(capacity)
    decoder.feed(ids[1])
    decoder.reset(capacity)
    assert np.array_equal(decoder.feed(ids[0], keep=0), first)
    with pytest.raises(OptionError, match="context"):
        decoder.feed(np.zeros(capacity, dtype=np.int64))


def test_artifact_holds_what_consumers_need(fused: Made) -> None:
    names = {file.name for file in fused[1].path.iterdir()}
    assert read_json(fused[1].path / "config.json").items() >= {"torch_dtype": "float32", "rope_theta": 10000.0}.items()
    wanted = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json", "tokenizer.json"}
    assert wanted | {"tokenizer_config.json", "manifest.json"} <= names
    assert not {name for name in names if name.startswith("parity") or name.endswith(".safetensors")}
    graph = ir.load(fused[1].path / "model.onnx").graph
    assert [v.name for v in graph.inputs][:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert [v.name for v in graph.outputs][:3] == ["logits", "present.0.key", "present.0.value"]


def test_tokenizer_reads_as_the_original_and_names_a_class_of_every_version(fused: Made, tiny: Path, text: Path) -> None:
    """Transformers 5 writes the class TokenizersBackend, which version 4 refuses to load."""
    assert read_json(tiny / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert read_json(fused[1].path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    prose = text.read_text()[:3000]
    ids = AutoTokenizer.from_pretrained(tiny)(prose)["input_ids"]
    assert AutoTokenizer.from_pretrained(fused[1].path)(prose)["input_ids"] == ids
    assert load_tokenizer(fused[1].path).encode(prose).ids == ids


def test_extra_tokens_of_any_form_are_carried() -> None:
    content = {"extra_special_tokens": [{"content": "<a>"}, "<b>"], "additional_special_tokens": None}
    assert with_v4_tokenizer(content) == {"additional_special_tokens": ["<a>", "<b>"]}


LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES: dict[str, tuple[dict | None, dict]] = {
    "default": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
    "scaled": (LINEAR | {"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": LINEAR}),
    "by layer": (
        {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "partial": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "none": (None, {}),
}


@pytest.mark.parametrize(("rope", "older"), ROPES.values(), ids=ROPES)
def test_config_has_the_keys_of_transformers_4(rope: dict | None, older: dict) -> None:
    """Beside those of version 5, which stay as they are; a key that is there already is not touched."""
    config = {"dtype": "bfloat16", "rope_parameters": rope, "model_type": "llama"}
    assert with_v4_keys(config) == config | older | {"torch_dtype": "bfloat16"}
    assert with_v4_keys(config | {"rope_theta": 3.0})["rope_theta"] == 3.0


def test_extra_special_tokens_under_the_name_that_both_versions_read() -> None:
    """Transformers 4 fails on the list that version 5 writes."""
    found = with_v4_tokenizer({"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<b>"], "eos_token": "<b>"})
    assert found == {"additional_special_tokens": ["<b>", "<a>"], "eos_token": "<b>"}
    named = {"extra_special_tokens": {"image_token": "<a>"}}
    assert with_v4_tokenizer(named) == named


def test_genai_generates_the_same_tokens(fused: Made, text: Path) -> None:
    """onnxruntime-genai reads the folder as it is."""
    import onnxruntime_genai as og

    folder = fused[1].path
    ids = text_windows(text, folder, budget=30, length=30)[0]
    decoder = Decoder(folder)
    wanted = list(decoder.greedy(ids, 20))
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 20, min_length=len(ids) + 20, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == wanted


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
    folder = random_model(LlamaConfig(**{**TINY, "num_hidden_layers": 2}, head_dim=8, tie_word_embeddings=True), tmp_path / "model")
    _, exported = make(folder, "rtn")
    assert exported.steps[-1].facts["exporter"] == "portable"
    assert "head size 8" in exported.steps[-1].facts["not_fused_because"]
    with pytest.raises(OptionError, match="head size 8"):
        make(folder, "rtn", "fused")


def test_portable_graph_reads_a_left_padded_batch(make: Callable[..., Made], tiny: Path, text: Path) -> None:
    """Two prompts of unequal length in one batch give the logits that each gives alone."""
    import onnxruntime

    packed, exported = make(tiny, "none", "portable")
    session = onnxruntime.InferenceSession(exported.path / "model.onnx", providers=["CPUExecutionProvider"])
    long = text_windows(text, packed.path, budget=24, length=24)[0]
    short = long[:11]
    ids = np.zeros((2, 24), dtype=np.int64)
    ids[0], ids[1, 13:] = long, short
    mask = np.ones((2, 24), dtype=np.int64)
    mask[1, :13] = 0
    past = {v.name: np.zeros((2, 2, 0, 16), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    found = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0][:, -1]
    model = load_model(packed.path)
    with torch.inference_mode():
        for row, prompt in zip(found, (long, short), strict=True):
            wanted = model(torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
            assert np.abs(row - wanted).max() < 1e-3 * wanted.std()


# ------------------------------------------------------------------------------------------------------- act-order


def in_another_order(source: Path, target: Path, shared: bool) -> Path:
    """A packed folder whose matrices have their columns in an order of their own, as GPTQ with act-order leaves them.

    shared: matrices that read the same input have the same order, as GPTQ's have; else every one another.
    """
    weights = load_file(source / "model.safetensors")
    linears = {}
    for number, name in enumerate(sorted(n.removesuffix(".weight") for n in weights if n.endswith("_proj.weight"))):
        weight = weights.pop(f"{name}.weight").numpy()
        order = np.random.default_rng(0 if shared else number).permutation(weight.shape[1]).astype(np.int32)
        rounded = round_to_nearest(name, weight[:, order], 4, 32, symmetric=False)
        linears[name] = replace(rounded, permutation=order)
    target.mkdir()
    packed.save(linears, target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / file).write_bytes((source / file).read_bytes())
    return target


@pytest.mark.parametrize(
    ("exporter", "shared"),
    [("fused", True), ("fused", False), ("portable", False), pytest.param("portable", True, marks=pytest.mark.families)],
)
def test_act_order_gathers_the_input(
    exporter: str, shared: bool, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Trap 1: rows sorted once, the input gathered in the same order, zero points kept, and never g_idx to the operator.

    Query, key and value are one operator where their orders agree, and several where not; every gather is made once.
    """
    layers = 2 if exporter == "fused" else 1  # tracing takes its time
    model = random_model(LlamaConfig(**TINY | {"num_hidden_layers": layers}, tie_word_embeddings=False), tmp_path / "model")
    source = in_another_order(model, tmp_path / "packed", shared)
    exported = stages.run("export", Artifact.load(source), tmp_path / "onnx", ExportOptions(exporter=exporter, text=text))
    nodes = list(ir.load(exported.path / "model.onnx").graph)
    matmuls = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(matmuls) == layers * (4 if exporter == "fused" and shared else 7)
    assert all(len(node.inputs) == 4 and node.inputs[3].name.endswith("zero_points") for node in matmuls)
    gathers = {node.outputs[0].name for node in nodes if node.op_type == "Gather" and "permut" in node.outputs[0].name}
    assert {node.inputs[0].name for node in matmuls} == gathers
    assert len(gathers) == layers * (4 if shared else 7)
    (down,) = [node for node in matmuls if node.inputs[1].name == "model.layers.0.mlp.down_proj.B"]
    order = down.inputs[0].producer().inputs[1].const_value.numpy()
    assert np.array_equal(order, PackedFile(source)["model.layers.0.mlp.down_proj"].permutation)


def test_g_idx_would_lose_the_zero_points(tmp_path: Path) -> None:
    """Why the operator's g_idx is not used: this onnxruntime ignores packed zero points beside it. When it no longer does,
    this test fails and the gather may go.
    """
    dice = np.random.default_rng(0)
    linear = round_to_nearest("m", dice.standard_normal((16, 64), dtype=np.float32) + 1, 4, 32, symmetric=False)
    b = Builder()
    x = b.input("x", ir.DataType.FLOAT, ["tokens", 64])
    kind, constants, attributes = operator(linear, 0)
    values = [b.constant(name, array) for name, array in constants.items()]
    order = b.constant("g_idx", (np.arange(64) // 32).astype(np.int32))
    y = b.op(kind, [x, *values, order], "y", domain=DOMAIN, **attributes)
    b.output(y, "y", ir.DataType.FLOAT, ["tokens", 16])
    ir.save(b.model({}), tmp_path / "m.onnx")
    given = dice.standard_normal((3, 64), dtype=np.float32)
    found = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": given})[0]
    assert not np.allclose(found, given @ linear.dequantized().T, rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------- bits by module, embeddings


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])
def test_bits_by_module(exporter: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    """The first rule that matches the whole name decides; what it leaves float is float in the artifact too."""
    rules = ("model.layers.0.self_attn.q_proj=16", r"model\.layers\.(0|3)\..*=8", "model.layers.0.*=2")
    options = QuantizeOptions(method="rtn", group_size=32, bits_for=rules[:2], embedding_bits=4)
    made = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", options)
    file = PackedFile(made.path)
    assert "model.layers.0.self_attn.q_proj" not in file
    for name in file:
        ends = {"lm_head": 8, "model.embed_tokens": 4}
        assert file[name].bits == ends.get(name, 8 if ".0." in name or ".3." in name else 4), name
    assert made.steps[-1].facts["bits"] == {"4": 14, "8": 13}
    assert made.steps[-1].facts["kept_float"] == ["model.layers.0.self_attn.q_proj.weight"]
    exported = stages.run("export", made, tmp_path / "onnx", ExportOptions(exporter=exporter, text=text))
    nodes = list(ir.load(exported.path / "model.onnx").graph)
    (embedding,) = [node for node in nodes if node.op_type == "GatherBlockQuantized"]
    assert embedding.attributes["bits"].as_int() == 4
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == (18 if exporter == "fused" else 28)
    with pytest.raises(OptionError, match="first match of no matrix"):
        stages.run("quantize", Artifact.load(tiny), tmp_path / "other", replace(options, bits_for=rules))


def test_embedding_float_by_choice(tiny: Path, tmp_path: Path) -> None:
    """16 leaves an end float; a tied matrix has one width, and two are refused."""
    made = stages.run(
        "quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", head_bits=4, embedding_bits=16)
    )
    assert made.steps[-1].facts["head"] == {"lm_head": 4}
    assert "model.embed_tokens.weight" in load_file(made.path / "model.safetensors")


def test_tied_matrix_has_one_width(reference: Path, call: Callable, tmp_path: Path) -> None:
    result = call("quantize", reference, tmp_path / "out", "--method", "rtn", "--embedding-bits", "4")
    assert result.code == 2 and "cannot have other bits than --head-bits 8" in result.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "int8"])
def test_one_scale_a_row(method: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    """--group-size -1: no operator has blocks that long, so the scale is repeated, and the manifest says in what blocks."""
    made = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method=method, group_size=-1))
    file = PackedFile(made.path)
    for name in (n for n in file if n.startswith("model.layers")):
        assert (file[name].scales == file[name].scales[:, :1]).all() and file[name].group_size in made.steps[-1].facts["blocks"]
    stages.run("export", made, tmp_path / "onnx", ExportOptions(text=text))
