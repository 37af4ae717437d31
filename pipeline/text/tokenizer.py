"""A folder's tokenizer as transformers makes it: its class may know more than the files, and rebuild what they say.

Folders that edgepress wrote hold all of it in their files (``write_tokenizer``), so an artifact is read without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgepress.pipeline.documents import short_line
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import MANIFEST, JsonObject, check_size, read_json, real, write_json
from edgepress.pipeline.model_files import check_files, read_tokenizer_config
from tokenizers import Tokenizer

FILE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_PROBE = "The old house stood. \u00c9t\u00e9, 2 \u5c71\n"
# Beside these lies what an older transformers wrote; any of them may decide what the special tokens are.
_OLDER = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
_FILES = (FILE, SETTINGS, TEMPLATE, *_OLDER, "config.json", MANIFEST, "model.onnx", "tokenizer.model", "vocab.json", "merges.txt")
_AS_THE_FILE_SAYS = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# Model types whose tokenizers transformers builds by a class of its own even where the files name one of the former.
OWN_CLASS = {
    "hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "siglip2",
}  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """What transformers makes of a folder's tokenizer.

    content: a tokenizer.json that encodes as it does. special: bos_token, eos_token and the like. template: of a chat without
    tools; None where there is none.
    """

    content: str
    special: dict[str, str]
    template: str | None


def read_file(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json as it stands. Raises ModelError for a damaged file and for none."""
    if not (folder / FILE).is_file():
        raise ModelError(f"{folder} has no {FILE}; give the complete folder")
    check_size(folder / FILE)
    return _usable(folder, lambda: Tokenizer.from_file(str(folder / FILE)))


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or artifact. Raises ModelError when it has none that can be used."""
    known = resolved(folder)
    return read_file(folder) if known is None else _usable(folder, lambda: Tokenizer.from_str(known.content))


def _usable(folder: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    settings = read_tokenizer_config(folder)
    try:
        tokenizer = make()
        tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))  # no tokenizer.json can say it
        # Fine-tuning leaves these on in the file: texts would be cut, and padding scored as text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None  # merges left out by chance, for training
        tokenizer.decode(tokenizer.encode(_PROBE).ids)  # some faults show only in use
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises plain Exception, and what is no Exception where its Rust code panics
        raise ModelError(f"{folder / FILE} cannot be used ({short_line(str(error))}); correct it or replace it") from error
    return tokenizer


def resolved(folder: Path) -> Resolved | None:
    """None where the files alone say what transformers makes of them, and where it cannot read the tokenizer itself.

    Raises ModelError where tokenizer.json is damaged, or missing and transformers cannot make one.
    """
    states = [(name, (folder / name).stat()) for name in _FILES if (folder / name).exists()]
    return _resolve(real(folder), tuple((name, state.st_mtime_ns, state.st_size) for name, state in states))


def write_tokenizer(source: Path, out: Path) -> None:
    """Complete the tokenizer files in ``out``, copied from ``source``, so that they alone say what transformers makes of them."""
    if (known := resolved(source)) is None:
        return
    if not (out / FILE).is_file() or _comparable((out / FILE).read_text(encoding="utf-8")) != _comparable(known.content):
        (out / FILE).write_text(known.content, encoding="utf-8")
    settings = read_tokenizer_config(out)
    if settings | known.special != settings:
        write_json(out / SETTINGS, settings | known.special)
    if known.template is not None and known.template != settings.get("chat_template"):
        (out / TEMPLATE).write_text(known.template, encoding="utf-8")


def _files_say_all(folder: Path) -> bool:
    """Whether edgepress wrote the folder, or tokenizer.json has every special token and is of a class that takes it as it is."""
    if (folder / MANIFEST).is_file() or (folder / "model.onnx").is_file():
        return True
    settings = read_tokenizer_config(folder)
    model_type = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if not (folder / FILE).is_file() or settings.get("tokenizer_class") not in _AS_THE_FILE_SAYS or model_type in OWN_CLASS:
        return False
    template = settings.get("chat_template")
    if any((folder / name).exists() for name in _OLDER) or not isinstance(template, str | None):
        return False
    tokens = [value for key, value in settings.items() if key.endswith("_token") and value is not None]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    tokens += [*extra, *(settings.get("added_tokens_decoder") or {}).values()] if isinstance(extra, list) else [extra]
    texts = {token.get("content") if isinstance(token, dict) else token for token in tokens if not isinstance(token, bool)}
    return texts <= {token.content for token in read_file(folder).get_added_tokens_decoder().values()}


@lru_cache(maxsize=4)
def _resolve(folder: Path, state: tuple[tuple[str, int, int], ...]) -> Resolved | None:
    """``resolved``, once; state: what tells whether a file has changed."""
    if _files_say_all(folder):
        return None
    check_files(folder)
    whole = (folder / FILE).is_file()
    if whole:
        read_file(folder)
    try:
        tokenizer = _load(folder)
        content = tokenizer.backend_tokenizer.to_str()
        special = {str(key): str(token) for key, token in tokenizer.special_tokens_map.items()}
    except Exception as error:  # tokenizer classes raise what they like
        if whole:
            if "auto_map" not in read_tokenizer_config(folder):  # else it is code of the folder's that is missing
                check_files(folder, spare=True)
            return None
        reason, cure = (str(error).strip().splitlines() or [type(error).__name__])[0], "give the complete checkpoint"
        if find_spec("sentencepiece") is None and any(folder.glob("*.model")):  # transformers then blames tiktoken
            reason, cure = "sentencepiece is not installed", f"pip install sentencepiece, or {cure}"
        raise ModelError(f"{folder} has no {FILE}, and transformers cannot make one of what is there ({reason}); {cure}") from error
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # none, or several and no default
        template = None
    return Resolved(content, special, template)


def _load(folder: Path) -> Any:
    """Transformers' tokenizer; Python code beside it is never run, and nothing is printed or fetched."""
    import logging

    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    finally:
        transformers_logging.set_verbosity(level)


def _comparable(content: str) -> JsonObject:
    """A tokenizer.json without what is switched off when it is loaded."""
    parsed: JsonObject = json.loads(content)
    return {key: value for key, value in parsed.items() if key not in ("truncation", "padding")}
