"""Faults that would pass without a word: each is refused or corrected, and each test fails when its guard is taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError, ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from safetensors.torch import load_file, save_file

RTN = QuantizeOptions(method="rtn", group_size=32)


def test_nan_is_no_parity(tiny: Path, text: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """NaN compares as no difference: a broken model must not be proven right."""
    source = copy_of(tiny)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = 3e38  # finite in the file, infinite in the logits
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="not finite"):
        stages.run("export", Artifact.load(source), tmp_path / "out", ExportOptions(text=text))
    assert not (tmp_path / "out").exists()


def test_an_edited_source_of_ours_is_noticed(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Its manifest still says what it was: what is made from it would carry a false history."""
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", RTN)
    config = read_json(packed.path / "config.json")
    (packed.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match=r"config\.json was changed"):
        stages.run("export", Artifact.load(packed.path), tmp_path / "onnx", ExportOptions(text=text))


def test_folders_of_another_recipe_are_not_mixed_in(tiny: Path, text: Path, call: Callable, tmp_path: Path) -> None:
    """Run and show would find the artifact of the former recipe."""
    (tmp_path / "a.yaml").write_text("prune: {remove_count: 1}\nquantize: {method: rtn}\n")
    (tmp_path / "b.yaml").write_text("quantize: {method: rtn}\n")
    first = ["build", tiny, tmp_path / "out", "--calibration", text, "--calibration-tokens", 300]
    assert call(*first, "--recipe", tmp_path / "a.yaml").code == 0
    refused = call("build", tiny, tmp_path / "out", "--recipe", tmp_path / "b.yaml")
    assert refused.code == 2 and "another recipe" in refused.err
