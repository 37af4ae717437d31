"""GGUF files as sources: the weights are the file's, the tokenizer is the model's, and damaged ones end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.options import ImportOptions
from edgepress.pipeline.text.windows import load_tokenizer
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
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


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
    source: Path, file: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32, architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """A Llama checkpoint as GGUF, its matrices of one type; returns the weights that it stands for, by Hugging Face's names."""
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
    for name, tensor in load_file(source / "model.safetensors").items():
        stored = weight = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        order = np.arange(len(weight)) if heads is None else interleaved(np.arange(len(weight))[:, None], heads)[:, 0]
        if weight.ndim == 2:
            stored = quantize(weight[order], kind)
            weight = np.empty_like(weight)
            weight[order] = dequantize(stored, kind)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if weight.ndim == 2 else None)
        restored[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return restored


def imported(file: Path, out: Path) -> Artifact:
    return stages.run("import", Artifact.load(file), out, ImportOptions())


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
def test_the_weights_are_the_files(kind: GGMLQuantizationType, reference: Path, tmp_path: Path) -> None:
    weights = write_gguf(reference, tmp_path / "model.gguf", kind)
    artifact = imported(tmp_path / "model.gguf", tmp_path / "out")
    state = load_model(artifact.path).state_dict()
    for name, weight in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), weight, err_msg=name)
    assert artifact.format == "hf" and set(artifact.steps[-1].facts["types"]) == {kind.name, "F32"}


def test_texts_become_the_same_tokens(reference: Path, text: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model.gguf")
    own = load_tokenizer(imported(tmp_path / "model.gguf", tmp_path / "out").path)
    prose = text.read_text()[:4000]
    assert own.encode(prose, add_special_tokens=False).ids == load_tokenizer(reference).encode(prose, add_special_tokens=False).ids


def test_what_lies_beside_the_file_is_not_read(reference: Path, tmp_path: Path) -> None:
    """Transformers would ask whether to run the code of that tokenizer, and take that config for the file's."""
    (folder := tmp_path / "downloads").mkdir()
    write_gguf(reference, folder / "model.gguf")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()")
    code = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("config", "tokenizer_config", "generation_config", "adapter_config"):
        (folder / f"{name}.json").write_text(json.dumps({"auto_map": code, "base_model_name_or_path": "somebody/else"}))
    artifact = imported(folder / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "RAN").exists() and not list(artifact.path.glob("*.py"))
    assert load_tokenizer(artifact.path).get_vocab() == load_tokenizer(reference).get_vocab()


def test_a_quantized_source_is_warned_of(reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "edgepress")
    write_gguf(reference, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    imported(tmp_path / "model.gguf", tmp_path / "out")
    assert any("quantized already (Q4_0)" in message for message in caplog.messages)


def test_every_stage_takes_a_gguf(
    reference: Path, tmp_path: Path, call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is imported once, into the cache."""
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    write_gguf(reference, tmp_path / "model.gguf")
    for out in ("a", "b"):
        result = call("quantize", tmp_path / "model.gguf", tmp_path / out, "--method", "rtn")
        assert result.code == 0, result.err  # type: ignore[attr-defined]
    assert "already done" in result.err  # type: ignore[attr-defined]
    (folder,) = (tmp_path / "cache" / "imports").iterdir()
    assert [step.stage for step in Artifact.load(tmp_path / "a").steps] == ["import", "quantize"] and folder.name.startswith(
        "model-"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_cut_short(share: float, reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(reference, file)
    with file.open("rb+") as opened:
        opened.truncate(int(share * file.stat().st_size))
    with pytest.raises(InputError, match=r"model.gguf is (damaged or cut short|not a GGUF file)"):
        imported(file, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("architecture", "says"), [("unheard-of", "transformers cannot convert model.gguf"), ("clip", "the vision part of a model")]
)
def test_an_architecture_that_cannot_be_converted(architecture: str, says: str, reference: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model.gguf", architecture=architecture)
    with pytest.raises(ModelError, match=says):
        imported(tmp_path / "model.gguf", tmp_path / "out")


def test_one_part_of_a_split_file(reference: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model-00001-of-00002.gguf")
    with pytest.raises(InputError, match="one part of a split GGUF; join the parts"):
        imported(tmp_path / "model-00001-of-00002.gguf", tmp_path / "out")
