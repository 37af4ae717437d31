"""What must change in a checkpoint when decoder blocks are removed: derived from config and names, not listed by model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from edgepress.pipeline.errors import ModelError

# Lists that may happen to be as long as the model is deep, but are not about layers.
NOT_PER_LAYER = re.compile(r"token_id|architectures|label|torchscript|tokens_ids")


def layer_count_key(config: dict[str, Any]) -> str:
    """The name that a raw config.json gives to its number of decoder blocks. Raises ModelError when there is none."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(config.get(key), int):
            return key
    raise ModelError("config.json does not say how many layers the model has; it must have num_hidden_layers")


def renamed(name: str, prefix: str, kept: Sequence[int]) -> str | None:
    """A tensor's name after removal: renumbered inside the blocks, None if its block is gone, else unchanged.

    prefix: name of the block list, as "model.layers". kept: old indices of the blocks that stay, ascending.
    """
    match = re.fullmatch(rf"(.*?{re.escape(prefix)}\.)(\d+)(\..*)", name)
    if not match:
        return name
    index = int(match[2])
    return f"{match[1]}{kept.index(index)}{match[3]}" if index in kept else None


def pruned_config(config: dict[str, Any], count_key: str, kept: Sequence[int]) -> dict[str, Any]:
    """The raw config.json with the new layer count and every per-layer list cut to the kept blocks.

    count_key: the name that this architecture gives to its number of layers ("num_hidden_layers", "n_layer", ...).
    """
    count = config[count_key]
    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and not NOT_PER_LAYER.search(key):
            changed[key] = [value[index] for index in kept]
    changed[count_key] = len(kept)
    if "max_window_layers" in changed:  # Qwen2: the first so many blocks attend globally
        changed["max_window_layers"] = sum(index < config["max_window_layers"] for index in kept)
    return changed
