"""Where the feed-forward channels of a checkpoint are: found by what a config with another width makes of the module tree."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from edgepress.models.pruned_config import with_size
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
_TRIED = (24, 40)  # widths; the second for a model that has the first


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
        return with_size(raw, self.key, width)


def find(checkpoint: Checkpoint) -> FeedForward:
    """Raises ModelError for an architecture whose config cannot name another width, or whose channels are more than a width."""
    model, config = checkpoint.meta_model(), checkpoint.config.get_text_config()
    reasons = []
    for key in (key for key in _KEYS if hasattr(config, key)):
        try:
            return _found(checkpoint, model, key, next(width for width in _TRIED if width != getattr(config, key)))
        except ModelError as error:
            reasons.append(str(error))
    reason = reasons[0] if reasons else "its config has no width of them"
    raise ModelError(
        f"{checkpoint.config.model_type} has no feed-forward channels that narrow can take out: {reason}; leave it out"
    )


def _found(checkpoint: Checkpoint, model: PreTrainedModel, key: str, tried: int) -> FeedForward:
    try:
        config = type(checkpoint.config).from_dict(with_size(copy.deepcopy(checkpoint.raw_config), key, tried))
        other = build_meta_model(config, checkpoint.path, checkpoint.trust_remote_code)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{key} cannot be changed alone") from error
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    changed = {n: (shapes[n], tuple(t.shape)) for n, t in other.state_dict().items() if shapes.get(n) != tuple(t.shape)}
    prefix, blocks = decoder_blocks(model)
    axes: dict[str, Axis] = {}
    widths = set()
    for name, (before, after) in changed.items():
        if "expert" in name:
            raise ModelError("they belong to experts")
        different = [axis for axis, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        module = model.get_submodule(name.rpartition(".")[0])
        if not name.startswith(f"{prefix}.") or len(different) != 1 or not isinstance(module, Linear | Conv1D):
            raise ModelError(f"{key} also decides {name}, which depends on all of them")  # a norm over the channels, say
        times = after[different[0]] // tried
        axes[name] = Axis(different[0], times)
        widths.add(before[different[0]] / times)
    down = [name for name in changed if _reads(model, name, axes[name].axis)]
    numbers = [name.split(".")[prefix.count(".") + 1] for name in down]
    if len(widths) != 1 or numbers != [str(i) for i in range(len(blocks))] or any(axes[name].times != 1 for name in down):
        raise ModelError(f"{key} is not the width of one feed-forward layer in every block")
    return FeedForward(key, int(widths.pop()), axes, [name.removesuffix(".weight") for name in down])


def _reads(model: PreTrainedModel, name: str, axis: int) -> bool:
    """Whether a tensor is a matrix whose inputs are the channels."""
    module = model.get_submodule(name.rpartition(".")[0])
    inputs = 0 if isinstance(module, Conv1D) else 1
    return name.endswith(".weight") and isinstance(module, Linear | Conv1D) and axis == inputs
