"""Configs and tokenizers that transformers 4 and 5 read alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgepress.exporters.configs import with_v4_keys, with_v4_tokenizer
from edgepress.pipeline.files import read_json
from edgepress.pipeline.text.windows import load_tokenizer
from transformers import AutoTokenizer

from .conftest import Made


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


@pytest.mark.parametrize(("rope", "v4"), ROPES.values(), ids=ROPES)
def test_config_has_the_keys_of_transformers_4(rope: dict | None, v4: dict) -> None:
    """Beside those of version 5, which stay as they are; a key that is there already is not touched."""
    config = {"dtype": "bfloat16", "rope_parameters": rope, "model_type": "llama"}
    assert with_v4_keys(config) == config | v4 | {"torch_dtype": "bfloat16"}
    assert with_v4_keys(config | {"rope_theta": 3.0})["rope_theta"] == 3.0


def test_extra_special_tokens_under_the_name_that_both_versions_read() -> None:
    """Transformers 4 fails on the list that version 5 writes."""
    content = with_v4_tokenizer({"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<b>"], "eos_token": "<b>"})
    assert content == {"additional_special_tokens": ["<b>", "<a>"], "eos_token": "<b>"}
    named = {"extra_special_tokens": {"image_token": "<a>"}}
    assert with_v4_tokenizer(named) == named
