"""Removing decoder blocks from a checkpoint folder: config rewritten and checked, safetensors copied by byte ranges."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from edgepress.models.config import arithmetic_fields, layer_count_key, pruned_configs, renamed
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.load import quiet, read_config
from edgepress.pipeline.checkpoint.shards import rewrite, rows_of, shards
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json, write_json
from transformers import AutoModelForCausalLM, PreTrainedConfig

# What a module knows of its own place; removal is there to change it.
_PLACE = {"layer_idx", "layer_index", "layer_id", "layer_number", "training"}


def remove_blocks(source: Path, out: Path, name: str, kept: Sequence[int], config: dict[str, Any]) -> None:
    """Write ``source`` with only the ``kept`` blocks (old indices, ascending) into the folder ``out``.

    name: of the block list, as "model.layers". Weights keep their dtype and bytes and are never loaded: memory does not grow
    with the checkpoint. Tokenizer and generation config are carried over; ``config`` is the new config.json.
    Raises ModelError when the tensors in the files do not go by the architecture's names.
    """
    prefixes = (name, name.split(".", 1)[-1])  # some checkpoints leave the base model's prefix out of their names
    if not any(renamed(tensor, prefixes, []) is None for tensor in rows_of(source)):
        raise ModelError(f"no tensor in {source} belongs to '{name}'; save the model again with this transformers' save_pretrained")
    rewrite(shards(source), out, lambda tensor: renamed(tensor, prefixes, kept))
    carry_files(source, out)
    write_json(out / "config.json", config)


def pruned_config(folder: Path, kept: Sequence[int], trust_remote_code: bool = False) -> dict[str, Any]:
    """The config.json that gives every kept block what it had: attention kind, window, experts, rotary embedding.

    Checked on the module tree, built without weights. Raises ModelError that names the fields in the way and the layers
    that could be removed instead, when no config says it.
    """
    raw, config = read_json(folder / "config.json"), read_config(folder, trust_remote_code)
    count_key = layer_count_key(raw)
    search = _Search(raw, config, trust_remote_code)
    found = search.expressed(kept)
    if found is None:
        fields = ", ".join(arithmetic_fields(config.to_dict())) or "its layout"
        removed = [index for index in range(raw[count_key]) if index not in kept]
        raise ModelError(
            f"without layers {', '.join(map(str, removed))} the others would become something else, for {config.model_type} "
            f"decides by a layer's number ({fields}); {search.allowed(len(removed))}"
        )
    return found


class _Structure:
    """What a config makes of each block, and of what is around them."""

    def __init__(self, blocks: list[Any], around: dict[str, Any]) -> None:
        self.blocks, self.around = blocks, around

    @classmethod
    def of(cls, config: PreTrainedConfig, trust_remote_code: bool) -> _Structure:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        name, modules = decoder_blocks(model)
        # GPT-2 may scale attention by the layer's number: then the place is part of what a block does.
        place = {"training"} if any("layer_idx" in key and value for key, value in config.to_dict().items()) else _PLACE
        around = {key: tuple(t.shape) for key, t in model.state_dict().items() if not key.startswith(f"{name}.")}
        return cls([_signature(block, place) for block in modules], around)


def _signature(block: torch.nn.Module, place: set[str]) -> list[Any]:
    plain = (int, float, bool, str, type(None))
    return [
        (
            name,
            type(module).__qualname__,
            {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in place},
            {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    ]


class _Search:
    """Looks for the config of a model without some of its blocks."""

    def __init__(self, raw: dict[str, Any], config: PreTrainedConfig, trust_remote_code: bool) -> None:
        self.raw, self.config, self.trust_remote_code = raw, config, trust_remote_code
        self.whole = _Structure.of(config, trust_remote_code)
        self.built: dict[str, _Structure | None] = {}

    def expressed(self, kept: Sequence[int]) -> dict[str, Any] | None:
        """The first way of writing the config that makes the kept blocks what they were, None when there is none."""
        wanted = [self.whole.blocks[index] for index in kept]
        for candidate in pruned_configs(self.raw, self.config.to_dict(), layer_count_key(self.raw), kept):
            found = self._structure(candidate)
            if found is not None and found.blocks == wanted and found.around == self.whole.around:
                return candidate
        return None

    def _structure(self, candidate: dict[str, Any]) -> _Structure | None:
        key = json.dumps(candidate, sort_keys=True, default=str)
        if key not in self.built:
            try:
                self.built[key] = _Structure.of(type(self.config).from_dict(copy.deepcopy(candidate)), self.trust_remote_code)
            except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, ModelError):
                self.built[key] = None  # the architecture does not take this way of saying it
        return self.built[key]

    def allowed(self, wanted: int) -> str:
        """The contiguous runs that could go, of the length ``wanted`` or else of the shortest that has any, as advice."""
        count = len(self.whole.blocks)
        for length in (wanted, *range(1, min(count, 17))):
            starts = range(count - length + 1)
            runs = [(i, i + length - 1) for i in starts if self.expressed([*range(i), *range(i + length, count)]) is not None]
            if runs:
                return f"these can go, by --layers: {', '.join(str(a) if a == b else f'{a} to {b}' for a, b in runs)}"
        return "no layer of it can be removed"
