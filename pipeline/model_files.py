"""The JSON files of a model folder: each read in one place, with what we take from it checked."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.documents import MAX_BYTES, DocumentError, JsonObject, shown, typed
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.files import MANIFEST, begins_with, check_pointer, check_size, read_json

# What transformers and tokenizers read whole, by themselves.
_READ_WHOLE = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "processor_config.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "model.safetensors.index.json",
}  # fmt: skip
_READ_WHOLE_KINDS = (".jinja", ".model", ".tiktoken")
# Of these, what a tokenizer.json stands for.
_SPARE, _SPARE_KINDS = {"vocab.json", "merges.txt", "tekken.json"}, (".model", ".tiktoken")
_LARGEST = {"special_tokens_map.json": 4 << 20}  # bytes; transformers makes an object of every value of it
_LARGEST_ID = (1 << 31) - 1
# Whole numbers of a config.json -> the largest that is read; far above the models there are, far below what exhausts memory.
# Some architectures give one a layer, as a list.
_WHOLE = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4096),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "head_dim", "num_attention_heads", "n_head", "num_key_value_heads"), 1 << 20
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "vocab_size"), 1 << 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length"), 1 << 24),
}
# Numbers that the exporters read of one architecture or another.
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "query_pre_attn_scalar",
    "final_logit_softcapping", "attn_logit_softcapping", "sliding_window", "initializer_range",
)  # fmt: skip
_LARGEST_SETTING = 1e12
# Numbers of a rotary embedding that divide, or whose logarithm is taken: one that is not greater than 0 makes no embedding.
_POSITIVE = {
    "factor", "rope_theta", "attention_factor", "original_max_position_embeddings", "partial_rotary_factor", "short_factor",
    "long_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
}  # fmt: skip
_NAMES = ("model_type", "dtype", "torch_dtype", "hidden_act", "hidden_activation", "activation_function", "_attn_implementation")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OBJECTS = ("quantization_config", "rope_parameters", "rope_scaling", "text_config", "auto_map")


def belongs_to_a_model(name: str) -> bool:
    """Whether a file of this name in a model's folder may be read as one of its own."""
    kinds = (*_READ_WHOLE_KINDS, ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".py", ".txt")
    return name in _READ_WHOLE or name == MANIFEST or name.endswith(("config.json", "index.json", *kinds))


def check_files(folder: Path, spare: bool = False) -> None:
    """Refuse files that a library would read whole, and that are not what it takes them for. Raises InputError.

    Without end, or larger than any model's; a pipe; a pointer of git-LFS; JSON that begins with a byte-order mark. spare: the last
    two also of what few tokenizers read beside a tokenizer.json.
    """
    spared = not spare and (folder / "tokenizer.json").exists()
    for file in sorted([*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]):
        if not file.exists() or not (file.name in _READ_WHOLE or file.suffix in _READ_WHOLE_KINDS):
            continue
        check_size(file, _LARGEST.get(file.name, MAX_BYTES))
        if spared and (file.name in _SPARE or file.suffix in _SPARE_KINDS):
            continue
        check_pointer(file)
        if file.suffix == ".json" and not file.name.endswith(".index.json") and begins_with(file, codecs.BOM_UTF8):
            raise InputError(
                f"{file} begins with a byte-order mark, and transformers reads no JSON that does; replace it by one saved without"
            )


def check_model_type(folder: Path, config: JsonObject) -> None:
    """Raise ModelError for a config.json of something else."""
    if "model_type" not in config:
        raise ModelError(f"{folder / 'config.json'} has no model_type, so it is not a Hugging Face model; give another folder")


def read_config(folder: Path) -> JsonObject:
    """config.json. Raises InputError when it is absent or no JSON, ModelError for a value that no model can have."""
    file = folder / "config.json"
    config = read_json(file)
    try:
        _check_config(config)
    except DocumentError as error:
        raise ModelError(f"{file}: {error}; correct it or replace it") from error
    return config


def _check_config(config: JsonObject) -> None:
    """Raise DocumentError for a value of the wrong type or out of bounds; keys that are absent or null are not looked at."""
    for key, most in _WHOLE.items():
        value = config.get(key)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if bad := [number for number in numbers if type(number) is not int or not 0 < number <= most]:
            raise DocumentError(f"{key} is {shown(bad[0])}, it must be a whole number from 1 to {most:,}")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise DocumentError(f"architectures is {shown(architectures)}, it must be a list of names")
    for key in _NAMES:
        if not isinstance(config.get(key), str | None):
            raise DocumentError(f"{key} is {shown(config[key])}, it must be a name")
    for key in _NUMBERS:
        if key in config and not _is_setting(config[key]):
            raise DocumentError(f"{key} is {shown(config[key])}, it must be a number of ordinary size")
    for key in _OBJECTS:
        if not isinstance(config.get(key) or {}, dict):
            raise DocumentError(f"{key} is {shown(config[key])}, it must be an object")
    for key in ("rope_parameters", "rope_scaling"):
        _check_rotary(config.get(key) or {}, key)
    _check_tokens(config)


def _check_rotary(settings: JsonObject, name: str) -> None:
    """Numbers, lists of them and the name of a kind; or the same for each type of layer."""
    for key, value in settings.items():
        if key in ("rope_type", "type"):
            if not isinstance(value, str | None):
                raise DocumentError(f"{key} is {shown(value)}, it must be a name")
        elif isinstance(value, dict):
            _check_rotary(value, f"{name}.{key}")
        elif not all(map(_is_setting, numbers := value if isinstance(value, list) else [value])):
            raise DocumentError(f"{name}.{key} is {shown(value)}, it must be a number of ordinary size, or a list of them")
        elif key in _POSITIVE and any(number is not None and number <= 0 for number in numbers):
            raise DocumentError(f"{name}.{key} is {shown(value)}, it must be greater than 0")


def _is_setting(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= _LARGEST_SETTING)


def _check_tokens(config: JsonObject) -> None:
    for key in _TOKENS:
        value = config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if bad := [token for token in ids if type(token) is not int or not -1 <= token <= _LARGEST_ID]:
            raise DocumentError(f"{key} is {shown(bad[0])}, it must be a token id, or a list of them")


def end_tokens(folder: Path) -> frozenset[int]:
    """Ids that end a generation, from generation_config.json or config.json. Raises InputError for what is no id."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        try:
            _check_tokens(content)
        except DocumentError as error:
            raise InputError(f"{folder / name}: {error}; correct it or replace it") from error
        if (ids := content.get("eos_token_id")) is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def read_tokenizer_config(folder: Path) -> JsonObject:
    """tokenizer_config.json, empty where there is none. Raises InputError."""
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


@dataclass(frozen=True)
class GenaiDecoder:
    """The graph as genai_config.json describes it."""

    num_hidden_layers: int = 0


@dataclass(frozen=True)
class GenaiModel:
    """The key ``model`` of genai_config.json; context_length in tokens."""

    context_length: int
    vocab_size: int
    decoder: GenaiDecoder

    def __post_init__(self) -> None:
        if not 0 < self.context_length <= _LARGEST_ID:
            raise ValueError(f"context_length is {shown(self.context_length)}, it must be from 1 to {_LARGEST_ID:,}")


@dataclass(frozen=True)
class _Genai:
    model: GenaiModel


def read_genai_config(folder: Path) -> GenaiModel:
    """What genai_config.json says of the model. Raises InputError when it is absent or damaged."""
    file = folder / "genai_config.json"
    try:
        return typed(_Genai, read_json(file), "genai_config").model
    except DocumentError as error:
        raise InputError(f"{file} is damaged ({error}); copy the complete folder again or export again") from error
