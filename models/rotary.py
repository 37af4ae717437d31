"""Rotary embeddings as configs describe them, and where their frequencies change with the length of the text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

LONG, GROWING = "longrope", "dynamic"


def parameters(config: PreTrainedConfig, index: int) -> dict[str, Any]:
    """The rotary parameters of a layer; empty for a model without rotary embedding."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope[config.layer_types[index]] if by_layer_type(config) else rope)


def by_layer_type(config: PreTrainedConfig) -> bool:
    """Whether each type of layer has parameters of its own, as in Gemma 3."""
    return any(isinstance(value, dict) for value in (getattr(config, "rope_parameters", None) or {}).values())


def switches(config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens of a text beyond which LongRoPE rotates with other frequencies, ascending; those within the context.

    Keys that were rotated before must be computed again then, and with them all that depends on them: the whole text.
    """
    lengths = (rope.get("original_max_position_embeddings") for rope in _of_type(config, LONG))
    return tuple(sorted({int(n) for n in lengths if n and n < config.max_position_embeddings}))


def grows(config: PreTrainedConfig) -> bool:
    """Whether frequencies change with every token beyond the context (dynamic NTK); within it they are fixed."""
    return bool(_of_type(config, GROWING))


def _of_type(config: PreTrainedConfig, kind: str) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    every = list(rope.values()) if by_layer_type(config) else [rope]
    return [one for one in every if isinstance(one, dict) and one.get("rope_type") == kind]
