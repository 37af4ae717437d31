"""What no model can have in its JSON files is named with its file and key, before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.model_files import GenaiDecoder, GenaiModel, end_tokens, read_config, read_genai_config

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "vocab_size": 512}


def write(folder: Path, name: str, **content: object) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**7),  # building them would take hours
        ("num_hidden_layers", -1),
        ("head_dim", 0),
        ("vocab_size", "x"),
        ("vocab_size", 10**30),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("intermediate_size", [64, -1]),
        ("architectures", {"a": 1}),
        ("architectures", [1]),
        ("model_type", ["llama"]),
        ("rope_parameters", "default"),
        ("rope_parameters", {"rope_type": {}}),
        ("rope_parameters", {"rope_type": "yarn", "factor": "x"}),
        ("rope_parameters", {"full_attention": {"rope_theta": 10**30}}),
        ("rope_scaling", {"short_factor": [1.0, []]}),
        ("dtype", {"a": "float16"}),
        ("hidden_act", 5),
        ("rms_norm_eps", "1e-5"),
        ("sliding_window", 10**30),
        ("quantization_config", [1]),
        ("eos_token_id", [[1]]),
        ("eos_token_id", "2"),
    ],
)
def test_a_value_that_no_model_has(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, "config.json", **CONFIG | {key: value}))
    assert "config.json" in str(caught.value) and key.partition("_")[0] in str(caught.value)


def test_configs_that_are_read(tmp_path: Path) -> None:
    """Absent, null, one size a layer, several end tokens, and keys that are not ours."""
    config = CONFIG | {"head_dim": None, "intermediate_size": [64, 96], "eos_token_id": [1, 2], "pad_token_id": -1, "x": {"y": [1]}}
    assert read_config(write(tmp_path, "config.json", **config)) == config


def test_end_tokens(tmp_path: Path) -> None:
    """Those of generation_config.json go before the config's."""
    write(tmp_path, "config.json", eos_token_id=1)
    assert end_tokens(tmp_path) == {1}
    assert end_tokens(write(tmp_path, "generation_config.json", eos_token_id=[2, 3])) == {2, 3}
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is \[1\]"):
        end_tokens(write(tmp_path, "generation_config.json", eos_token_id=[[1]]))


@pytest.mark.parametrize(
    "model",
    [
        5,
        {"context_length": 256, "vocab_size": 5},
        {"context_length": 256, "vocab_size": 5, "decoder": []},
        {"context_length": -5, "vocab_size": 5, "decoder": {}},
        {"context_length": 1e3, "vocab_size": 5, "decoder": {}},
        {"context_length": 10**12, "vocab_size": 5, "decoder": {}},
    ],
)
def test_damaged_genai_config(model: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is damaged"):
        read_genai_config(write(tmp_path, "genai_config.json", model=model))


def test_genai_config(tmp_path: Path) -> None:
    folder = write(tmp_path, "genai_config.json", model={"context_length": 9, "vocab_size": 5, "decoder": {"num_hidden_layers": 4}})
    assert read_genai_config(folder) == GenaiModel(9, 5, GenaiDecoder(4))
