"""Token ids wherever a checkpoint's JSON files name them: which they are, and the same files with new ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgepress.pipeline.files import JsonObject

# Of these, ids that are trimmed are left out: what is never written need not be suppressed.
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_PAIRS = ("forced_decoder_ids", "sequence_bias")  # of a position and an id, and of ids and a number


def named_ids(content: JsonObject) -> Iterator[int]:
    """Ids that mean something to the model: bos_token_id and its like, and tokens that are forced."""
    for key, value in content.items():
        if isinstance(value, dict) and key != "added_tokens_decoder":
            yield from named_ids(value)
        elif _names_tokens(key) or key == "forced_decoder_ids":
            yield from _numbers([pair[1] for pair in _pairs(value)] if key == "forced_decoder_ids" else value)


def renumbered(content: JsonObject, new: Mapping[int, int]) -> JsonObject:
    """A config, generation config or tokenizer config with new ids; what names an id that is gone is left out, or null."""
    result: JsonObject = {}
    for key, value in content.items():
        if key == "added_tokens_decoder" and isinstance(value, dict):
            known = {int(number): token for number, token in value.items() if str(number).isdecimal()}
            result[key] = {str(new[number]): token for number, token in known.items() if number in new}
        elif isinstance(value, dict):
            result[key] = renumbered(value, new)
        elif key in _PAIRS and isinstance(value, list):
            ids_at = 1 if key == "forced_decoder_ids" else 0
            result[key] = [
                [_mapped(part, new) if place == ids_at else part for place, part in enumerate(pair)]
                for pair in _pairs(value)
                if all(number in new for number in _numbers(pair[ids_at]))
            ]
        elif _names_tokens(key) or key in _LISTS:
            result[key] = _mapped(value, new)
        else:
            result[key] = value
    return result


def _pairs(value: object) -> list[list[Any]]:
    """The entries of a list that are pairs; another one means nothing to transformers either."""
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []


def _names_tokens(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "_token_index"))


def _numbers(value: object) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif type(value) is int and value >= 0:
        yield value


def _mapped(value: object, new: Mapping[int, int]) -> object:
    """An id, or lists of them; a list within a list, as of bad words, goes as a whole."""
    if isinstance(value, list):
        return [_mapped(item, new) for item in value if all(number in new for number in _numbers(item))]
    return new.get(value) if type(value) is int and value >= 0 else value
