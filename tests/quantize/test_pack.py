"""What the quantize stage packs, under which names and which way round, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.quantize.rtn import round_to_nearest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, MixtralConfig

RTN = QuantizeOptions(method="rtn", group_size=32)


def test_nan_weight_is_named(tiny: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Rounding would turn its group into zeros."""
    source = copy_of(tiny)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        stages.run("quantize", Artifact.load(source), tmp_path / "out", RTN)


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])
def test_a_tied_head_stored_twice_is_packed_once(
    exporter: str, random_model: Callable[..., Path], tiny: Path, text: Path, tmp_path: Path
) -> None:
    """The float copy would outlive the packed one, and torch and ONNX would use different heads."""
    content = read_json(tiny / "config.json") | {"tie_word_embeddings": True, "num_hidden_layers": 2}
    source = random_model(LlamaConfig(**content), tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", RTN)
    assert "lm_head.weight" not in load_file(packed.path / "model.safetensors")
    stages.run("export", packed, tmp_path / "onnx", ExportOptions(text=text, exporter=exporter))


@pytest.mark.parametrize("prefix", ["transformer.", pytest.param("", marks=pytest.mark.families)])
def test_conv1d_is_quantized_the_right_way_round(
    prefix: str, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """GPT-2 stores its matrices as (in, out), some of them square: turned the wrong way they would still fit.

    Its first checkpoints also leave out the "transformer." of every name: packed matrices would stand beside the float ones.
    """
    config = GPT2Config(vocab_size=5120, n_embd=64, n_layer=1, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    source = random_model(config, tmp_path / "gpt2")
    weights = load_file(source / "model.safetensors")
    short = {prefix + name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(short, source / "model.safetensors", metadata={"format": "pt"})
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", RTN)
    file = PackedFile(packed.path)
    assert len(list(file)) == 5 and sorted(p.name for p in packed.path.iterdir() if p.is_dir()) == []
    for name in file:
        weight = weights[f"{name}.weight"].numpy()
        wanted = round_to_nearest(name, weight if name.endswith("wte") else weight.T, file[name].bits, 32, name.endswith("wte"))
        assert np.array_equal(file[name].codes, wanted.codes)
        assert file[name].shape == wanted.shape
    assert not {f"{name}.weight" for name in file} & set(load_file(packed.path / "model.safetensors"))
    exported = stages.run("export", packed, tmp_path / "onnx", ExportOptions(text=text))
    kinds = [n.op_type for n in ir.load(exported.path / "model.onnx").graph]
    assert kinds.count("MatMulNBits") == 5 and "Gemm" not in kinds


def test_names_without_prefix_are_completed(tiny: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint of the base model has no 'model.' prefix: packed matrices would stand beside the float ones."""
    source = copy_of(tiny)
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    found = stages.run("quantize", Artifact.load(source), tmp_path / "out", RTN)
    wanted = stages.run("quantize", Artifact.load(tiny), tmp_path / "wanted", RTN)
    for name in ("packed.safetensors", "model.safetensors"):
        assert load_file(found.path / name).keys() == load_file(wanted.path / name).keys()
    file = PackedFile(found.path)
    assert all(np.array_equal(file[name].codes, PackedFile(wanted.path)[name].codes) for name in file)


def test_weights_under_other_names_are_not_left_float(tiny: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Names that are nobody's: what cannot be found is not passed over."""
    source = copy_of(tiny)
    weights = {name.replace("mlp", "ffn"): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        stages.run("quantize", Artifact.load(source), tmp_path / "out", RTN)


@pytest.mark.families
def test_experts_that_stay_float_are_named(
    random_model: Callable[..., Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MoE models keep all experts of a block in one 3-D weight: float in an artifact that is called 4 bits, and said so."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(
        vocab_size=5120, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        **shape,
    )  # fmt: skip
    source = random_model(config, tmp_path / "moe")
    caplog.set_level("INFO", logger="edgepress")
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", RTN)
    kept = packed.steps[-1].facts["kept_float"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in kept and "model.layers.0.mlp.experts.down_proj" in kept
    assert packed.steps[-1].facts["linears"] == 4 + 2
    assert "% of the blocks' weights stay float, model.layers.0.mlp.experts.gate_up_proj for one" in caplog.text
    exported = stages.run("export", packed, tmp_path / "onnx", ExportOptions(text=text))
    assert exported.steps[-1].facts["parity"][0]["greedy_match_tokens"] == 32
