"""Removing decoder blocks from a checkpoint folder: config rewritten and checked, safetensors copied by byte ranges."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from edgepress.models.pruned_config import arithmetic_fields, layer_count_key, pruned_configs, renamed
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import build_meta_model
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, write_json
from transformers import PreTrainedConfig

# What a module knows of its own position; removal is there to change it.
_POSITION = {"layer_idx", "layer_index", "layer_id", "layer_number", "training"}
Setting = int | float | bool | str | None
Shape = tuple[int, ...]


def remove_blocks(source: Checkpoint, out: Path, name: str, kept: Sequence[int], config: JsonObject) -> None:
    """Write ``source`` with only the ``kept`` blocks (indices in ``source``, ascending) into the folder ``out``.

    name: of the block list, as "model.layers". Weights keep their dtype and bytes and are never loaded: memory does not grow
    with the checkpoint. Tokenizer and generation config are carried over, Python code where it is trusted; ``config`` is the new
    config.json.
    Raises ModelError when the tensors in the files do not go by the architecture's names.
    """
    prefixes = (name, name.split(".", 1)[-1])  # some checkpoints omit the base model's prefix in their names
    if not any(renamed(tensor, prefixes, []) is None for tensor in source.shapes):
        raise ModelError(
            f"no tensor in {source.path} belongs to '{name}'; save the model again with this transformers' save_pretrained"
        )
    source.rewrite(out, lambda tensor: renamed(tensor, prefixes, kept))
    carry_files(source.path, out, source.trust_remote_code)
    write_json(out / "config.json", config)


def pruned_config(checkpoint: Checkpoint, kept: Sequence[int]) -> JsonObject:
    """The config.json that gives every kept block what it had: attention kind, window, experts, rotary embedding.

    Checked on the module tree, built without weights. Raises ModelError that names the fields in the way and the layers
    that could be removed instead, when no config expresses it.
    """
    search = _Search(checkpoint)
    config = search.expressed(kept)
    if config is None:
        fields = ", ".join(arithmetic_fields(checkpoint.config.to_dict())) or "its layout"
        removed = [index for index in range(checkpoint.layers) if index not in kept]
        raise ModelError(
            f"removing layers {', '.join(map(str, removed))} would change the layers that stay, because "
            f"{checkpoint.config.model_type} derives what a layer is from its index ({fields}); {search.allowed(len(removed))}"
        )
    return config


@dataclass(frozen=True)
class _Module:
    """What a config makes of one module of a block: its class, its plain attributes, the shapes of its own parameters."""

    name: str
    kind: str
    settings: dict[str, Setting]
    shapes: dict[str, Shape]


@dataclass(frozen=True)
class _Structure:
    """What a config makes of each block, and the shapes of the tensors around the blocks."""

    blocks: list[list[_Module]]
    around: dict[str, Shape]

    @classmethod
    def of(cls, config: PreTrainedConfig, checkpoint: Checkpoint) -> _Structure:
        model = build_meta_model(config, checkpoint.path, checkpoint.trust_remote_code)
        name, modules = decoder_blocks(model)
        # GPT-2 may scale attention by the layer's index: then the position is part of what a block does.
        scaled = any("layer_idx" in key and value for key, value in config.to_dict().items())
        ignored = {"training"} if scaled else _POSITION
        around = {key: tuple(t.shape) for key, t in model.state_dict().items() if not key.startswith(f"{name}.")}
        return cls([_signature(block, ignored) for block in modules], around)


def _signature(block: torch.nn.Module, ignored: set[str]) -> list[_Module]:
    return [
        _Module(
            name,
            type(module).__qualname__,
            {k: v for k, v in vars(module).items() if isinstance(v, int | float | bool | str | None) and k not in ignored},
            {k: tuple(p.shape) for k, p in module.named_parameters(recurse=False)},
        )
        for name, module in block.named_modules()
    ]


class _Search:
    """Looks for the config of a model without some of its blocks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.whole = _Structure.of(checkpoint.config, checkpoint)
        self.built: dict[str, _Structure | None] = {}

    def expressed(self, kept: Sequence[int]) -> JsonObject | None:
        """The first way of writing the config that makes the kept blocks what they were, None when there is none."""
        blocks, raw = [self.whole.blocks[index] for index in kept], self.checkpoint.raw_config
        for candidate in pruned_configs(raw, self.checkpoint.config.to_dict(), layer_count_key(raw), kept):
            structure = self._structure(candidate)
            if structure is not None and structure.blocks == blocks and structure.around == self.whole.around:
                return candidate
        return None

    def _structure(self, candidate: JsonObject) -> _Structure | None:
        key = json.dumps(candidate, sort_keys=True, default=str)
        if key not in self.built:
            config = type(self.checkpoint.config)
            try:
                self.built[key] = _Structure.of(config.from_dict(copy.deepcopy(candidate)), self.checkpoint)
            except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, ModelError):
                self.built[key] = None  # the architecture does not accept this way of writing it
        return self.built[key]

    def allowed(self, length: int) -> str:
        """Advice: the contiguous runs that could go, of ``length`` layers or else of the fewest for which there are any."""
        count = len(self.whole.blocks)
        for size in (length, *range(1, min(count, 17))):
            starts = range(count - size + 1)
            runs = [(i, i + size - 1) for i in starts if self.expressed([*range(i), *range(i + size, count)]) is not None]
            if runs:
                return f"these can go, by --remove-layers: {', '.join(str(a) if a == b else f'{a} to {b}' for a, b in runs)}"
        return "no layer of it can be removed"
