"""Configs that cannot express what is left are refused, with advice which layers could go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks
from transformers import (
    Gemma3nTextConfig,
    GPT2Config,
    JambaConfig,
)


def small(name: str) -> dict[str, int]:
    return {"vocab_size": 5120, "hidden_size": 64, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0} | (
        {} if name == "gpt2" else {"intermediate_size": 96, "num_hidden_layers": 8, "num_key_value_heads": 2}
    )


def test_a_period_that_no_list_expresses_is_refused(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """Jamba's attention layers follow from their number alone: the message names the fields and the runs that could go."""
    config = JambaConfig(
        **small("jamba"), attn_layer_period=4, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_d_conv=2, pad_token_id=0,
    )  # fmt: skip
    folder = random_model(config, tmp_path / "jamba")
    with pytest.raises(ModelError, match=r"attn_layer_period.*by --remove-layers: 0 to 3, 1 to 4, 2 to 5, 3 to 6, 4 to 7$"):
        pruned_config(Checkpoint(folder), [0, 2, 4, 6])
    with pytest.raises(ModelError, match=r"these can go, by --remove-layers: 7$"):
        pruned_config(Checkpoint(folder), [0, 1, 2, 4, 5, 6, 7])
    kept = [0, 1, 2, 3]
    assert pruned_config(Checkpoint(folder), kept)["num_hidden_layers"] == 4


def test_kv_shared_between_layers_is_refused(tmp_path: Path) -> None:
    """Gemma 3n's last layers read the keys of earlier ones, and its embedding has a slice for each layer."""
    config = Gemma3nTextConfig(
        vocab_size=512, vocab_size_per_layer_input=512, hidden_size=64, hidden_size_per_layer_input=8, intermediate_size=96,
        num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_kv_shared_layers=4, laurel_rank=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="num_kv_shared_layers"):
        pruned_config(Checkpoint(tmp_path), [0, 1, 2, 3, 4, 5, 6, 7, 8])


def test_attention_scaled_by_the_layers_number_is_refused(tmp_path: Path) -> None:
    """GPT-2's scale_attn_by_inverse_layer_idx: only the last layers can go without changing the others."""
    GPT2Config(n_embd=64, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"scale_attn_by_inverse_layer_idx.*by --remove-layers: 3$"):
        pruned_config(Checkpoint(tmp_path), [0, 2, 3])
    assert pruned_config(Checkpoint(tmp_path), [0, 1])["n_layer"] == 2


def test_a_layer_of_foreign_names_is_refused(tmp_path: Path, tiny: Path) -> None:
    """Tensors that go by other names than the architecture's would all be kept, and the config would lie about them."""
    with pytest.raises(ModelError, match="no tensor in"):
        remove_blocks(Checkpoint(tiny), tmp_path, "model.decoder.blocks", [0, 1], {})
