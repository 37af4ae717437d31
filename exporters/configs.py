"""Configs of an artifact: for transformers 4 and 5, and for onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

from edgepress.exporters.architecture import attending_layers
from edgepress.models.families import FAMILIES, head_size
from edgepress.models.rotary import switches
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.files import JsonObject, read_json, write_json
from edgepress.pipeline.model_files import end_tokens
from transformers import PreTrainedConfig


def write_configs(checkpoint: Checkpoint, out: Path, target: str, *, shared_cache: bool) -> None:
    """Write everything but the graph into the artifact ``out``: configs, tokenizer and genai_config.json."""
    carry_files(checkpoint.path, out, checkpoint.trust_remote_code)
    config = with_v4_keys(checkpoint.raw_config)
    write_json(out / "config.json", {key: value for key, value in config.items() if key != "quantization_config"})
    generation = out / "generation_config.json"
    if not generation.is_file():  # optimum looks for it
        write_json(generation, {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config})
    if (out / "tokenizer_config.json").is_file():
        write_json(out / "tokenizer_config.json", with_v4_tokenizer(read_json(out / "tokenizer_config.json")))
    write_json(out / "genai_config.json", genai_config(checkpoint, target, shared_cache=shared_cache))


def with_v4_keys(config: JsonObject) -> JsonObject:
    """A config.json of transformers 5 plus the keys that version 4 reads; a key that is there already keeps its value.

    They are torch_dtype, rope_theta, rope_scaling, rope_local_base_freq, and those of the architecture (``Family.v4_keys``).
    """
    v4: JsonObject = {}
    if "dtype" in config:
        v4["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:  # one each for global and local layers, as Gemma 3 has
        if "rope_theta" in (rope.get("sliding_attention") or {}):
            v4["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope.get("full_attention") or {}
    if "rope_theta" in rope:
        v4["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        v4["rope_scaling"] = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in rope:
        v4["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if (family := FAMILIES.get(config.get("model_type", ""))) is not None:
        v4 |= {name: rope[key] for key, name in family.v4_keys.items() if key in rope}
    return v4 | config


def with_v4_tokenizer(content: JsonObject) -> JsonObject:
    """A tokenizer_config.json whose class and extra special tokens transformers 4 reads as well as version 5."""
    if content.get("tokenizer_class") == "TokenizersBackend":
        content = content | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(extra := content.get("extra_special_tokens"), list):  # version 4 expects a dict under this name
        content = {key: value for key, value in content.items() if key != "extra_special_tokens"}
        tokens = [*(content.get("additional_special_tokens") or []), *extra]
        texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        content["additional_special_tokens"] = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    return content


# As GenAI's model builder writes them.
_GENAI_PROVIDERS: dict[str, list[dict[str, dict[str, str]]]] = {
    "cpu": [],
    "web": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
}


def genai_config(checkpoint: Checkpoint, target: str, *, shared_cache: bool) -> JsonObject:
    """What onnxruntime-genai needs to run the folder; the keys are GenAI's.

    shared_cache: past and present of the key-value cache are one buffer.
    """
    config, ends = checkpoint.config, sorted(end_tokens(checkpoint.path))
    context = int(getattr(config, "max_position_embeddings", 0) or checkpoint.context)
    # GenAI knows of one change of rotary frequencies only, of Phi-3 at 4,096 tokens: by default it stays before the first.
    longest = min([context, *switches(config)])
    bos = config.bos_token_id if config.bos_token_id is not None else (checkpoint.tokenizer.encode("a").ids or [0])[0]
    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else (ends or [0])[0]
    return {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": bos,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": pad,
            "decoder": _genai_decoder(config, target, len(attending_layers(config, checkpoint.silent))),
        },
        "search": {"do_sample": False, "max_length": longest, "num_beams": 1, "past_present_share_buffer": shared_cache},
    }


def _genai_decoder(config: PreTrainedConfig, target: str, caches: int) -> JsonObject:
    """caches: how many layers have one, which is all that GenAI counts layers for."""
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": _GENAI_PROVIDERS[target]},
        "filename": "model.onnx",
        "head_size": head_size(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": caches,
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
    }
