"""Configs of an artifact: for transformers 4 and 5, and for onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepress.models.families import head_size
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.runtime.decoder import end_tokens
from edgepress.pipeline.text.windows import context_length, load_tokenizer
from transformers import PreTrainedConfig


def write_configs(source: Path, out: Path) -> None:
    """Carry the configs and the tokenizer of the checkpoint ``source`` into the artifact ``out``."""
    carry_files(source, out)
    config = with_older_keys(read_json(source / "config.json"))
    write_json(out / "config.json", {key: value for key, value in config.items() if key != "quantization_config"})
    generation = out / "generation_config.json"
    if not generation.is_file():  # optimum looks for it
        write_json(generation, {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config})
    if (out / "tokenizer_config.json").is_file():
        content = read_json(out / "tokenizer_config.json")
        write_json(out / "tokenizer_config.json", with_older_tokenizer(content))


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config with version 4's keys beside version 5's: torch_dtype, rope_theta, rope_scaling, rope_local_base_freq."""
    older: dict[str, Any] = {}
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:  # one each for global and local layers, as Gemma 3 has
        if "rope_theta" in (rope.get("sliding_attention") or {}):
            older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope.get("full_attention") or {}
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":  # names of its own
        names = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
        older |= {name: rope[key] for key, name in names.items() if key in rope}
    return older | config


def with_older_tokenizer(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config with the class that both versions know, and its extra special tokens under the name that both read."""
    if content.get("tokenizer_class") == "TokenizersBackend":
        content = content | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(extra := content.get("extra_special_tokens"), list):  # version 4 wants a dict under this name
        content = {key: value for key, value in content.items() if key != "extra_special_tokens"}
        every = [*(content.get("additional_special_tokens") or []), *extra]
        texts = [one.get("content") if isinstance(one, dict) else one for one in every]
        content["additional_special_tokens"] = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    return content


# As GenAI's model builder writes them.
_GENAI_PROVIDERS: dict[str, list[dict[str, dict[str, str]]]] = {
    "cpu": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
}


def genai_config(config: PreTrainedConfig, folder: Path, target: str, *, shared: bool) -> dict[str, Any]:
    """What onnxruntime-genai needs to run the folder; its key names are GenAI's."""
    ends = sorted(end_tokens(folder))
    context = int(getattr(config, "max_position_embeddings", 0) or context_length(folder))
    bos = config.bos_token_id if config.bos_token_id is not None else (load_tokenizer(folder).encode("a").ids or [0])[0]
    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else (ends or [0])[0]
    return {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": bos,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": _GENAI_PROVIDERS[target]},
                "filename": "model.onnx",
                "head_size": head_size(config),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": shared},
    }
