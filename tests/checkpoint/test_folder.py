"""Checkpoint: what is float and what is packed, by name, the same in every way of asking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import load
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
from safetensors.torch import load_file
from transformers import PreTrainedConfig

MATRIX, FLOAT = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint with packed and float matrices."""
    out = tmp_path_factory.mktemp("packed") / "packed"
    run("quantize", Artifact.load(tiny), out, QuantizeOptions(method="rtn", group_size=32, bits_for=(".*q_proj=16",)))
    return Checkpoint(out)


def test_every_way_to_a_weight_agrees(packed: Checkpoint) -> None:
    """matrix, weights.tensor, weights.shape, and both torch models hold the same numbers."""
    matrix = packed.matrix(MATRIX)
    assert isinstance(matrix, PackedLinear) and isinstance(packed.matrix(FLOAT), np.ndarray)
    whole = dict(packed.model().named_parameters())
    assert set(whole) == packed.weights.names
    for name, parameter in whole.items():
        assert torch.equal(packed.weights.tensor(name), parameter)
        assert packed.weights.shape(name) == tuple(parameter.shape)
    assert np.array_equal(matrix.dequantized(), whole[f"{MATRIX}.weight"].detach().numpy())
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(packed.model()(ids).logits, packed.offloaded_model()(ids).logits)


def test_packed_matrices_are_not_among_the_stored_tensors(packed: Checkpoint) -> None:
    """``tensor`` and ``shapes`` speak of the files of float weights; ``weights`` of all."""
    assert packed.tensor(f"{MATRIX}.weight") is None and f"{MATRIX}.weight" not in packed.shapes
    assert f"{MATRIX}.weight" in packed.weights and "model.layers.9.mlp.up_proj.weight" not in packed.weights
    stored = load_file(packed.path / "model.safetensors")
    tensor = packed.tensor(f"{FLOAT}.weight")
    assert tensor is not None and torch.equal(tensor, stored[f"{FLOAT}.weight"])
    assert {name for name, _ in packed.tensors()} == set(stored)


def test_config_is_read_once_and_stays_as_it_was(packed: Checkpoint) -> None:
    """Models are built from copies: what one changes in its config reaches no other."""
    assert packed.layers == 4 and packed.context == 256
    config = packed.config.to_dict()
    packed.model().config.hidden_size = packed.meta_model().config.num_hidden_layers = 1
    assert packed.config.to_dict() == config and packed.config is packed.config


def test_index_names_a_missing_tensor(tiny: Path) -> None:
    index = ShardIndex.of(tiny)
    assert "nothing" not in index
    with pytest.raises(ModelError, match="lacks nothing"):
        index.tensor("nothing")


def test_a_config_of_parts_without_a_padding_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason is said, whatever attributes it lacks."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("Padding_idx must be within num_embeddings")

    class Composite(PreTrainedConfig):  # type: ignore[misc]
        model_type = "composite"

        def to_dict(self) -> dict[str, object]:
            return {}

        def __getattribute__(self, name: str) -> object:
            if name in ("pad_token_id", "vocab_size"):
                raise AttributeError(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(ModelError, match=r"cannot make a model of .*config.json \(pad_token_id is None, and vocab_size None\)"):
        load.build_meta_model(Composite(), tmp_path)
