"""What is rewritten in a config and in the names of tensors when blocks are removed."""

from __future__ import annotations

from edgepress.models.pruned_config import pruned_configs, renamed
from transformers import Qwen2Config


def test_qwen2_window_boundary_moves_with_the_blocks() -> None:
    """max_window_layers counts blocks from the first: those removed below it must be taken off."""
    config = Qwen2Config(num_hidden_layers=6, max_window_layers=4, use_sliding_window=True).to_dict()
    changed = next(pruned_configs(config, config, "num_hidden_layers", [0, 2, 3, 5]))
    assert (changed["num_hidden_layers"], changed["max_window_layers"]) == (4, 3)


def test_names_outside_the_blocks_stay() -> None:
    """Renaming touches the block number alone, also where another part of the name is a number or ends alike."""
    both = ("model.layers", "layers")
    assert renamed("model.layers.3.mlp.experts.3.w", both, [0, 3]) == "model.layers.1.mlp.experts.3.w"
    assert renamed("layers.3.mlp.w", both, [0, 3]) == "layers.1.mlp.w"
    assert renamed("model.layers.2.mlp.w", both, [0, 3]) is None
    assert renamed("model.norm.weight", both, [0, 3]) == "model.norm.weight"
    assert renamed("vision.layers.2.w", both, [0, 3]) == "vision.layers.2.w"
    assert renamed("transformer.h.1.attn.bias", ("transformer.h", "h"), [1]) == "transformer.h.0.attn.bias"
    assert renamed("transformer.path.1.w", ("transformer.h", "h"), [1]) == "transformer.path.1.w"
