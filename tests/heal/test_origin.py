"""Which layers are gone, and whether the original is the one they were removed from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.heal.origin import check_original, kept_layers
from edgepress.pipeline.options import HealOptions, PruneOptions, QuantizeOptions


def test_layers_removed_twice_are_counted_in_the_original(pruned: Artifact, reference: Path, tiny: Path, tmp_path: Path) -> None:
    again = stages.run("prune", pruned, tmp_path / "again", PruneOptions(remove_layers=(0, 4), calibration_tokens=500))
    assert kept_layers(again, Checkpoint(reference)) == [1, 2, 3, 7, 8, 10, 11, 12, 13, 14, 15]
    assert kept_layers(again, Checkpoint(pruned.path)) == [1, 2, 3, *range(5, 13)]
    with pytest.raises(OptionError, match="has 4 layers"):
        kept_layers(again, Checkpoint(tiny))


def test_a_foreign_original_is_refused(
    pruned: Artifact, tiny: Path, tmp_path: Path, copy_of: Callable[..., Path], reference: Path, options: Callable[..., HealOptions]
) -> None:
    """One of other depth, and one of the same shape with another embedding, are not what the layers were removed from."""
    from safetensors.torch import load_file, save_file

    other = copy_of(reference)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for original, message in ((tiny, "has 4 layers"), (pruned.path, "has 13 layers"), (other, "model.embed_tokens.weight differs")):
        with pytest.raises(OptionError, match=message):
            stages.run("heal", pruned, tmp_path / "out", options(original))
    assert not (tmp_path / "out").exists()


def test_a_packed_original_is_refused(pruned: Artifact, reference: Path, tmp_path: Path) -> None:
    """Its tensors have other names: the line is about the original, and does not call the checkpoint damaged."""
    packed = stages.run("quantize", Artifact.load(reference), tmp_path / "packed", QuantizeOptions(method="rtn"))
    with pytest.raises(OptionError, match=r"is not what .* was pruned from"):
        check_original(Checkpoint(pruned.path), Checkpoint(packed.path))
