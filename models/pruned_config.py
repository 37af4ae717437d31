"""What must change in a config when decoder blocks are removed: derived from the config itself, not listed by model.

A config can describe single layers in four ways: by lists with one entry per layer, by lists of layer numbers, by counts
from the first layer, and by arithmetic on the layer's number. The last is turned into one of the others where the
architecture reads one; pipeline/prune/surgery.py finds out whether the result is right, by building it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from edgepress.pipeline.errors import ModelError

Config = dict[str, Any]  # what config.json holds; its keys are transformers'
# Lists that may happen to be as long as the model is deep, but are not about layers.
_NOT_PER_LAYER = re.compile(r"token_id|architectures|label|torchscript|tokens_ids")
_LAYER_NUMBERS = re.compile(r"layers|_idxs?$|_indices$")
# How many of the first blocks are of one kind.
_COUNTS_FROM_THE_FIRST = ("max_window_layers", "first_k_dense_replace")
# (every so many layers one is of a kind, the key of the list of layer numbers that are of the other kind)
_STEPS = (("decoder_sparse_step", "mlp_only_layers"),)
_ARITHMETIC = re.compile(r"period|offset|pattern|interval|_step$|_freq$|num_kv_shared_layers|inverse_layer_idx")


def layer_count_key(config: Config) -> str:
    """The name that a raw config.json gives to its number of decoder blocks. Raises ModelError when there is none."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(config.get(key), int):
            return key
    if isinstance(config.get("text_config"), dict):
        raise ModelError("this is a multi-modal model; save only its text model (transformers: model.language_model) and give that")
    raise ModelError("config.json does not give the number of layers; add num_hidden_layers")


def renamed(name: str, prefixes: Sequence[str], kept: Sequence[int]) -> str | None:
    """A tensor's name after removal: renumbered inside the blocks, None if its block is gone, else unchanged.

    prefixes: possible names of the block list, such as ("model.layers", "layers"). kept: former indices of the remaining
    blocks, ascending.
    """
    match = re.fullmatch(rf"((?:{'|'.join(map(re.escape, prefixes))})\.)(\d+)(\..*)", name)
    if not match:
        return name
    index = int(match[2])
    return f"{match[1]}{kept.index(index)}{match[3]}" if index in kept else None


def pruned_configs(config: Config, resolved: Config, count_key: str, kept: Sequence[int]) -> Iterator[Config]:
    """Candidates for the raw config.json of the remaining blocks, the least changed first.

    resolved: the config as transformers completes it, with what it derives from a layer's number written out. count_key:
    this architecture's key of the number of layers.
    """
    count = config[count_key]
    changed = copy.deepcopy(config)
    for key, value in resolved.items():
        value = value if config.get(key) is None else config[key]
        if isinstance(value, list) and len(value) == count and not _NOT_PER_LAYER.search(key):
            changed[key] = [value[index] for index in kept]
    changed[count_key] = len(kept)
    for key in _COUNTS_FROM_THE_FIRST:
        if isinstance(changed.get(key), int):
            changed[key] = sum(index < changed[key] for index in kept)
    if config.get("attention_types") and "attention_layers" in changed:  # GPT-Neo spells its list as pattern and count
        changed["attention_types"] = [[changed.pop("attention_layers"), 1]]
    yield changed
    numbered = {
        key: [kept.index(index) for index in value if index in kept]
        for key, value in resolved.items()
        if isinstance(value, list) and _LAYER_NUMBERS.search(key) and _are_layer_numbers(value, count)
    }
    if numbered:
        yield {**changed, **numbered}
    for step_key, list_key in _STEPS:
        step = resolved.get(step_key)
        if isinstance(step, int) and step > 1:
            others = [i for i in range(count) if (i + 1) % step or i in (resolved.get(list_key) or [])]
            yield {**changed, step_key: 1, list_key: [kept.index(index) for index in others if index in kept]}


def _are_layer_numbers(value: list[object], count: int) -> bool:
    return bool(value) and all(type(i) is int and 0 <= i < count for i in value) and len(set(value)) == len(value) != count


def arithmetic_fields(resolved: Config) -> list[str]:
    """The config's fields that decide by a layer's number, named in the message that refuses a removal."""
    return [
        key for key, value in resolved.items() if _ARITHMETIC.search(key) and (value is True or (type(value) is int and value > 1))
    ]


def with_size(config: dict[str, Any], key: str, size: int) -> dict[str, Any]:
    """The config with another size, of the vocabulary or the feed-forward layers, wherever it stands; at the top where nowhere."""
    parts = {name: with_size(part, key, size) for name, part in config.items() if isinstance(part, dict) and key in part}
    return config | parts | ({key: size} if key in config or not parts else {})
