"""Where the feed-forward channels of a checkpoint are: found by what a config with another width makes of the module tree."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import build_meta_model
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject
from torch.nn import Linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# What architectures call the width; absent or null in a config of GPT-2, which then takes four times the hidden size.
_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_hidden_dim", "inner_dim")
_TRIED = 24  # a width that no model has


@dataclass(frozen=True)
class Axis:
    """A tensor that has the channels on one of its axes, several times in a row where gate and up are one matrix."""

    axis: int
    times: int


@dataclass(frozen=True)
class FeedForward:
    """The channels of a checkpoint.

    key: of the config. width: channels of every block. axes: tensor -> where its channels are. down: for each block in order, the
    module that reads the channels.
    """

    key: str
    width: int
    axes: dict[str, Axis]
    down: list[str]

    def config(self, raw: JsonObject, width: int) -> JsonObject:
        """config.json with another width."""
        return _with(raw, self.key, width)


def find(checkpoint: Checkpoint) -> FeedForward:
    """Raises ModelError for an architecture whose config cannot name another width, or whose channels belong to experts."""
    model, reason = checkpoint.meta_model(), "its config has no width of them"
    for key in _KEYS:
        try:
            return _found(checkpoint, model, key)
        except ModelError as error:
            reason = str(error) if "expert" in str(error) else reason
    raise ModelError(f"{checkpoint.config.model_type} has no feed-forward channels that narrow can take out: {reason}")


def _found(checkpoint: Checkpoint, model: PreTrainedModel, key: str) -> FeedForward:
    config = type(checkpoint.config)
    try:
        tried = config.from_dict(_with(copy.deepcopy(checkpoint.raw_config), key, _TRIED))
        other = build_meta_model(tried, checkpoint.path, checkpoint.trust_remote_code)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{key} cannot be changed") from error
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    changed = {n: (shapes[n], tuple(t.shape)) for n, t in other.state_dict().items() if shapes.get(n) != tuple(t.shape)}
    prefix, blocks = decoder_blocks(model)
    axes: dict[str, Axis] = {}
    widths = set()
    for name, (before, after) in changed.items():
        if len(before) > 2:
            raise ModelError("they belong to experts")
        different = [axis for axis, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        if not name.startswith(f"{prefix}.") or len(different) != 1 or after[different[0]] % _TRIED:
            raise ModelError(f"{key} is more than a width")
        times = after[different[0]] // _TRIED
        axes[name] = Axis(different[0], times)
        widths.add(before[different[0]] / times)
    down = [name.removesuffix(".weight") for name in changed if _reads(model, name, axes[name].axis)]
    if len(widths) != 1 or [name.split(".")[len(prefix.split("."))] for name in down] != [str(i) for i in range(len(blocks))]:
        raise ModelError(f"{key} is not the width of one feed-forward layer in every block")
    return FeedForward(key, int(widths.pop()), axes, down)


def _reads(model: PreTrainedModel, name: str, axis: int) -> bool:
    """Whether a tensor is a matrix whose inputs are the channels."""
    module = model.get_submodule(name.rpartition(".")[0])
    inputs = 0 if isinstance(module, Conv1D) else 1
    return name.endswith(".weight") and isinstance(module, Linear | Conv1D) and axis == inputs


def _with(raw: JsonObject, key: str, width: int) -> JsonObject:
    """The config with the width where it stands, in a part of it or at the top."""
    parts = {name: _with(part, key, width) for name, part in raw.items() if isinstance(part, dict) and key in part}
    return {**raw, **parts} if parts and key not in raw else {**raw, key: width}
