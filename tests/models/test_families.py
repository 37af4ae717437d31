"""A family's row holds everything in which it differs from Llama: no code asks for a model by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgepress.exporters.architecture import rotary_kind
from edgepress.exporters.configs import with_v4_keys
from edgepress.models.families import FAMILIES, Family
from families import family_config
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parents[2]


def names_compared(source: str) -> Iterator[str]:
    """Names of architectures that a source text compares something with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            names = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield from (name for name in names if name in CONFIG_MAPPING)


@pytest.mark.parametrize("folder", ["exporters", "models", "pipeline"])
def test_no_code_names_a_family(folder: str) -> None:
    compared = {file: list(names_compared(file.read_text())) for file in (ROOT / folder).rglob("*.py")}
    assert compared and not {file: names for file, names in compared.items() if names}


@pytest.mark.parametrize("line", ['config.model_type == "smollm3"', 'kind in ("gpt_neox", "other")'])
def test_a_named_family_is_found(line: str) -> None:
    assert list(names_compared(line))


def test_layers_without_positions() -> None:
    """SmolLM3 lists them; other families have positions everywhere."""
    config = family_config("smollm3")
    kinds = [rotary_kind(config, index) for index in range(config.num_hidden_layers)]
    assert [kind is None for kind in kinds] == [not used for used in config.no_rope_layers] and None in kinds
    llama = family_config("llama")
    assert {rotary_kind(llama, index) for index in range(llama.num_hidden_layers)} == {""}


def test_keys_of_an_architectures_own() -> None:
    """GPT-NeoX reads its rotary settings under names of its own in transformers 4."""
    config = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    assert with_v4_keys(config).items() >= {"rotary_pct": 0.25, "rotary_emb_base": 1e4}.items()
    assert not {"rotary_pct", "rotary_emb_base"} & with_v4_keys(config | {"model_type": "llama"}).keys()


def test_modules_of_a_block() -> None:
    assert Family().block() == {
        "input_layernorm", "post_attention_layernorm",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    assert {"self_attn.qkv_proj", "mlp.gate_up_proj"} < FAMILIES["phi3"].block()
    assert {"self_attn.q_norm", "self_attn.k_norm"} < FAMILIES["qwen3"].block()
