"""What must change in a config when decoder blocks are removed: derived from what the config says, not listed by model.

A config can say things of single layers in four ways: by lists with an entry a layer, by lists of layer numbers, by
counts from the first layer, and by arithmetic on the layer's number. The last is turned into one of the others where the
architecture reads one; whether the result is right is for pipeline/prune/surgery.py to find out, by building it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

from edgepress.pipeline.errors import ModelError

# Lists that may happen to be as long as the model is deep, but are not about layers.
_NOT_PER_LAYER = re.compile(r"token_id|architectures|label|torchscript|tokens_ids")
_LAYER_NUMBERS = re.compile(r"layers|_idxs?$|_indices$")
# So many of the first blocks are of a kind.
_COUNTS_FROM_THE_FIRST = ("max_window_layers", "first_k_dense_replace")
# (every so many layers there is one of a kind, the list of the numbers of those that are of the other kind)
_STEPS = (("decoder_sparse_step", "mlp_only_layers"),)
_ARITHMETIC = re.compile(r"period|offset|pattern|interval|_step$|_freq$|num_kv_shared_layers|inverse_layer_idx")


def layer_count_key(config: dict[str, Any]) -> str:
    """The name that a raw config.json gives to its number of decoder blocks. Raises ModelError when there is none."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(config.get(key), int):
            return key
    if isinstance(config.get("text_config"), dict):
        raise ModelError(
            "this is a multi-modal model; save its text model alone (transformers: model.language_model) and give that"
        )
    raise ModelError("config.json does not say how many layers the model has; it must have num_hidden_layers")


def renamed(name: str, prefixes: Sequence[str], kept: Sequence[int]) -> str | None:
    """A tensor's name after removal: renumbered inside the blocks, None if its block is gone, else unchanged.

    prefixes: names that the block list may go by, as ("model.layers", "layers"). kept: old indices of the blocks that
    stay, ascending.
    """
    match = re.fullmatch(rf"((?:{'|'.join(map(re.escape, prefixes))})\.)(\d+)(\..*)", name)
    if not match:
        return name
    index = int(match[2])
    return f"{match[1]}{kept.index(index)}{match[3]}" if index in kept else None


def pruned_configs(
    config: dict[str, Any], resolved: dict[str, Any], count_key: str, kept: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Ways in which the raw config.json may say what is left, the least changed first.

    resolved: the config as transformers completes it; what it derives from a layer's number is written out. count_key: the
    name that this architecture gives to its number of layers.
    """
    count = config[count_key]
    changed = copy.deepcopy(config)
    for key, value in resolved.items():
        own = config.get(key)
        value = value if own is None else own
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


def _are_layer_numbers(value: list[Any], count: int) -> bool:
    return bool(value) and all(type(i) is int and 0 <= i < count for i in value) and len(set(value)) == len(value) != count


def arithmetic_fields(resolved: dict[str, Any]) -> list[str]:
    """The config's fields that decide by a layer's number, for the message that refuses."""
    return [
        key for key, value in resolved.items() if _ARITHMETIC.search(key) and (value is True or (type(value) is int and value > 1))
    ]
