"""A folder of weights means what plain transformers makes of it: in the torch models, through every stage, and in both graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.exporters import fused
from edgepress.exporters.architecture import obstacle
from edgepress.exporters.configs import write_configs
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import save
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import ExportOptions, HealOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.stages import run
from families import FAMILIES, TINY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
IDS = torch.arange(7, 47)[None]
NEOX = GPTNeoXConfig(**TINY | {"num_key_value_heads": 4}, rotary_pct=0.5)
LLAMA = LlamaConfig(**TINY, tie_word_embeddings=False)
TIED = LlamaConfig(**TINY, tie_word_embeddings=True)
MIXTRAL = MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)


def changed(folder: Path, change: Change) -> Path:
    """The folder with other tensors in its one file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain(folder: Path) -> torch.Tensor:
    """Logits (tokens, vocabulary) by transformers alone."""
    with torch.inference_mode():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits[0]
    return logits


def ours(folder: Path) -> list[torch.Tensor]:
    """The same by our torch models; the offloaded one is for what has the fused graph."""
    checkpoint = Checkpoint(folder)
    models = [checkpoint.model()] + ([checkpoint.offloaded_model()] if checkpoint.config.model_type == "llama" else [])
    with torch.inference_mode():
        return [model(IDS).logits[0] for model in models]


def exported(folder: Path, out: Path, exporter: str, text: Path) -> Artifact:
    done = run("export", Artifact.load(folder), out, ExportOptions(exporter=exporter, text=text, accuracy_level="0"))
    assert done.steps[-1].facts["exporter"] == exporter
    return done


def in_onnx(folder: Path) -> np.ndarray:
    return Decoder(folder).forward([IDS[0].numpy()])[0]


def in_fused_graph(folder: Path, out: Path) -> np.ndarray:
    """Logits of the fused graph, written without the proof of an export."""
    out.mkdir()
    checkpoint = Checkpoint(folder)
    assert obstacle(checkpoint) is None
    save(fused.build(checkpoint, 0, Builder()), out / "model.onnx")
    write_configs(checkpoint, out, "cpu", shared_cache=True)
    return in_onnx(out)


def close(onnx: np.ndarray, logits: torch.Tensor) -> bool:
    return bool(np.abs(onnx - logits.numpy()).max() < 1e-4 * float(logits.std()))


# ---------------------------------------------------------------------------------------------- what the model does not use


def older_buffers(state: Tensors) -> None:
    """What older transformers saved with GPT-NeoX: in half precision the mask's value is -inf."""
    for layer in range(4):
        name = f"gpt_neox.layers.{layer}.attention"
        state[f"{name}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        state[f"{name}.masked_bias"] = torch.tensor(-1e9).half()
        state[f"{name}.rotary_emb.inv_freq"] = torch.ones(4)


def more_layers(state: Tensors) -> None:
    """Layers beyond the config's number: cut by hand, or heads that predict several tokens."""
    state |= {n.replace("layers.0.", "layers.4."): t.clone() for n, t in list(state.items()) if "layers.0." in n}
    state |= {"model.layers.4.eh_proj.weight": torch.full((64, 128), torch.nan), "model.layers.4.enorm.weight": torch.ones(64)}


def biases(state: Tensors) -> None:
    """Biases that the config does not switch on."""
    for name, tensor in list(state.items()):
        if "_proj.weight" in name:
            state[name.replace(".weight", ".bias")] = torch.ones(len(tensor))


UNUSED: dict[str, tuple[PreTrainedConfig, Change]] = {
    "masked-bias": (NEOX, older_buffers),
    "more-layers": (LLAMA, more_layers),
    "biases": (LLAMA, biases),
}


@pytest.mark.parametrize("case", UNUSED)
def test_what_the_model_does_not_use_is_left_aside(
    case: str, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Logits of our torch models and of the fused graph, and the next stages' files; NaN and Inf in it are nobody's concern."""
    config, change = UNUSED[case]
    folder = random_model(config, tmp_path / "model", torch.float16 if config is NEOX else torch.float32)
    before = set(load_file(folder / "model.safetensors"))
    extra = set(load_file(changed(folder, change) / "model.safetensors")) - before
    assert set(Checkpoint(folder).reading.unused) == extra
    expected = plain(folder)
    assert all(torch.equal(logits, expected) for logits in ours(folder))
    if config is LLAMA:
        assert close(in_fused_graph(folder, tmp_path / "fused"), expected)
    options = PruneOptions(remove_layers=(2,), calibration=text, calibration_tokens=256)
    pruned = run("prune", Artifact.load(folder), tmp_path / "pruned", options)
    packed = run("quantize", Artifact.load(folder), tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32))
    for artifact in (pruned, packed):
        assert set(artifact.steps[-1].facts["unused_tensors"]) == extra
        assert not Checkpoint(artifact.path).reading.unused and not set(load_file(artifact.path / "model.safetensors")) & extra


def test_the_log_names_what_is_not_used(random_model: Callable[..., Path], tmp_path: Path, call: Callable[..., Any]) -> None:
    folder = changed(random_model(LLAMA, tmp_path / "model"), biases)
    result = call("quantize", folder, tmp_path / "out", "--method", "none")
    assert "does not use model.layers.0.mlp.down_proj.bias, " in result.err and "and 25 more" in result.err


def renamed_experts(state: Tensors) -> None:
    """As Mixtral's files name them: each expert by itself, which transformers merges."""
    for name in list(state):
        block = name.replace("mlp.experts", "block_sparse_moe.experts").rsplit(".", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(state.pop(name)):
                state[f"{block}.{number}.w1.weight"], state[f"{block}.{number}.w3.weight"] = expert.clone().chunk(2)
        elif name.endswith("experts.down_proj"):
            state |= {f"{block}.{number}.w2.weight": expert.clone() for number, expert in enumerate(state.pop(name))}


def without_prefix(state: Tensors) -> None:
    """As the files of GPT-2 are named."""
    for name in list(state):
        state[name.removeprefix("transformer.")] = state.pop(name)


def head_twice(state: Tensors) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def embedding_as_head(state: Tensors) -> None:
    """A tied matrix under the head's name alone."""
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


NAMES: dict[str, tuple[PreTrainedConfig, Change]] = {
    "no-prefix": (GPT2Config(**FAMILIES["gpt2"]), without_prefix),
    "experts": (MIXTRAL, renamed_experts),
    "head-twice": (TIED, head_twice),
    "head-alone": (TIED, embedding_as_head),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_transformers_changes_are_used(case: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    config, change = NAMES[case]
    folder = changed(random_model(config, tmp_path / "model"), change)
    assert not Checkpoint(folder).reading.unused and not Checkpoint(folder).reading.untied
    with torch.inference_mode():
        assert torch.equal(Checkpoint(folder).model()(IDS).logits[0], plain(folder))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_infinity_in_a_parameter_is_refused(name: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(random_model(LLAMA, tmp_path / "model"), lambda state: state[name].view(-1)[3].fill_(torch.inf))
    for load in (Checkpoint(folder).model, Checkpoint(folder).offloaded_model):
        with pytest.raises(ModelError, match=rf"{name} in .* holds NaN or Inf"):
            load()


def test_infinity_in_a_buffer_is_not(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """A mask is -inf; what is a buffer the model's class decides."""
    name = "model.norm.weight"
    folder = changed(random_model(LLAMA, tmp_path / "model"), lambda state: state[name].fill_(-torch.inf))
    weights = Weights(folder)
    assert name in dict(weights.without(set(), weights.names - {name}).floats())
    with pytest.raises(ModelError, match="holds NaN or Inf"):
        list(weights.floats())


def test_codes_stored_as_bfloat16_may_look_like_nan(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """bnb_4bit_quant_storage keeps bytes of codes under a float type, and some of them spell NaN; scales are real numbers."""
    source = random_model(LlamaConfig(**TINY | {"num_hidden_layers": 1}, tie_word_embeddings=False), tmp_path / "float")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, dtype=torch.float32, device_map="cpu")
    folder, name = tmp_path / "nf4", "model.layers.0.mlp.up_proj.weight"
    model.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    codes = load_file(folder / "model.safetensors")[name]
    codes.view(torch.uint8).view(-1)[:2] = torch.tensor([0xFF, 0x7F], dtype=torch.uint8)
    assert codes.dtype == torch.bfloat16 and codes.isnan().any()
    changed(folder, lambda state: state.update({name: codes}))
    assert close(in_fused_graph(folder, tmp_path / "fused"), ours(folder)[0])
    changed(folder, lambda state: state[f"{name}.absmax"].fill_(torch.nan))
    with pytest.raises(ModelError, match=r"absmax in .* holds NaN"):
        load_model(folder)


# --------------------------------------------------------------------------------------------------- a head called tied


def another_head(state: Tensors) -> None:
    torch.manual_seed(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1 + 0.3 * torch.randn(5120, 64))


@pytest.fixture(scope="module")
def two_matrices(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json says tied, and the file holds another head: what merges and fine-tunes of the head alone leave."""
    return changed(random_model(TIED, tmp_path_factory.mktemp("tied") / "model"), another_head)


def test_a_head_that_differs_is_not_tied(two_matrices: Path, text: Path, tmp_path: Path) -> None:
    """In both torch models and the fused graph; the artifact's config says what it holds."""
    expected = plain(two_matrices)
    assert all(torch.equal(logits, expected) for logits in ours(two_matrices))
    artifact = exported(two_matrices, tmp_path / "onnx", "fused", text)
    assert close(in_onnx(artifact.path), expected)
    assert read_json(artifact.path / "config.json")["tie_word_embeddings"] is False
    assert artifact.steps[-1].facts["untied_head"] is True


def test_a_head_that_differs_stays_through_removal_healing_and_quantization(two_matrices: Path, text: Path, tmp_path: Path) -> None:
    """Each stage's folder, read by plain transformers where it is float, has the head and says so."""
    options = PruneOptions(remove_layers=(2,), calibration=text, calibration_tokens=256)
    pruned = run("prune", Artifact.load(two_matrices), tmp_path / "pruned", options)
    healing = HealOptions(original=two_matrices, healer="linear", calibration=text, calibration_tokens=1000)
    healed = run("heal", pruned, tmp_path / "healed", healing)
    head = load_file(two_matrices / "model.safetensors")["lm_head.weight"]
    for artifact in (pruned, healed):
        assert torch.equal(load_file(artifact.path / "model.safetensors")["lm_head.weight"], head)
        assert all(torch.equal(logits, plain(artifact.path)) for logits in ours(artifact.path))
    packed = run("quantize", healed, tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32))
    weights = Checkpoint(packed.path).weights
    assert read_json(packed.path / "config.json")["tie_word_embeddings"] is False
    assert {"lm_head", "model.embed_tokens"} <= weights.matrices
    assert torch.allclose(weights.tensor("lm_head.weight"), head, atol=0.01)
    assert close(in_fused_graph(packed.path, tmp_path / "fused"), ours(packed.path)[0])


def test_an_equal_head_stays_tied_and_is_stored_once(random_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(random_model(TIED, tmp_path / "model"), head_twice)
    packed = run("quantize", Artifact.load(folder), tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32, head_bits=8))
    assert "lm_head.weight" not in Checkpoint(packed.path).weights.names
    assert read_json(packed.path / "config.json")["tie_word_embeddings"] is True


def words(codes: np.ndarray) -> torch.Tensor:
    """Codes of 4 bits (out, in) as GPTQ's int32 (in / 8, out)."""
    fields = codes.T.reshape(-1, 8, len(codes)).astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))[:, None]
    return torch.from_numpy(np.ascontiguousarray(np.bitwise_or.reduce(fields, axis=1)).view(np.int32))


def as_gptq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix as GPTQ stores it, symmetric in groups of 32, and the matrix that this stands for."""
    module, (rows, columns) = name.removesuffix(".weight"), weight.shape
    grouped = weight.reshape(rows, -1, 32).numpy()
    scales = (np.abs(grouped).max(-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales) + 8, 0, 15)
    stored = {
        "qweight": words(codes.reshape(rows, columns).astype(np.uint8)),
        "qzeros": torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32),  # 8, stored less one
        "scales": torch.from_numpy(np.ascontiguousarray(scales[..., 0].T)).half(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // 32,
    }
    meant = torch.from_numpy(((codes - 8) * scales).reshape(rows, columns))
    return {f"{module}.{part}": tensor for part, tensor in stored.items()}, meant


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_that_the_config_calls_tied(
    tied: bool, two_matrices: Path, copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Transformers replaces the blocks' matrices by quantized ones, never the head: a tied one is the float embedding."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": True}
    folder = copy_of(two_matrices, "gptq", tie_word_embeddings=tied, quantization_config=settings)
    float_folder = copy_of(two_matrices, "float", tie_word_embeddings=tied)
    packed: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(two_matrices / "model.safetensors").items():
        quantized = "_proj" in name or name == "lm_head.weight"
        parts, meant[name] = as_gptq(name, tensor) if quantized else ({name: tensor}, tensor)
        packed |= parts
    if tied:
        del meant["lm_head.weight"]
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, float_folder / "model.safetensors", metadata={"format": "pt"})
    expected = plain(float_folder)
    assert all(torch.equal(logits, expected) for logits in ours(folder))
    parts = {f"lm_head.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert set(Checkpoint(folder).reading.unused) == (parts if tied else set())
    assert close(in_fused_graph(folder, tmp_path / "fused"), expected)


@pytest.mark.families  # each trace takes seconds
@pytest.mark.parametrize("case", ["masked-bias", "biases", "another-head"])
def test_the_portable_graph_reads_alike(case: str, random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    config, change = UNUSED.get(case, (TIED, another_head))
    folder = changed(random_model(config, tmp_path / "model"), change)
    artifact = exported(folder, tmp_path / "onnx", "portable", text)
    assert close(in_onnx(artifact.path), plain(folder))
    assert artifact.steps[-1].facts["untied_head" if case == "another-head" else "unused_tensors"]
