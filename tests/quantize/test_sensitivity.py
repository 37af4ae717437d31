"""Which matrices need more bits: a table, a file, and a proposal that quantize takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.options import QuantizeOptions


def test_command_prints_what_quantize_takes(call: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path) -> None:
    """Every matrix is in the table and in the file, and the lines of the recipe give the mean that was asked for."""
    few = ("--calibration", text, "--calibration-tokens", "512", "--target-bits", "5.5")
    result = call("sensitivity", tiny, "--out", tmp_path / "s.json", *few)
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "s.json").read_text())
    assert len(content["rows"]) == 16 and sum(len(row["matrices"]) for row in content["rows"]) == 28
    for row in content["rows"]:
        assert row["matrices"][0] in result.out
        assert row["kl"]["8/64"] < row["kl"]["4/32"] < row["kl"]["4/64"] < row["kl"]["2/64"]
    recipe = yaml.safe_load(result.out[result.out.index("quantize:\n") :])["quantize"]
    assert recipe == content["quantize"] and recipe["bits_for"]
    options = QuantizeOptions(method="rtn", **recipe | {"bits_for": tuple(recipe["bits_for"])})
    weights = Checkpoint(stages.run("quantize", Artifact.load(tiny), tmp_path / "q", options).path).weights
    blocks = [packed for name in weights.matrices if "layers" in name and (packed := weights.packed(name))]
    assert 5.0 < 8 * sum(x.nbytes for x in blocks) / sum(x.shape[0] * x.shape[1] for x in blocks) <= 5.5


def test_output_must_be_a_file(call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    result = call("sensitivity", tiny, "--out", tmp_path)
    assert result.code == 2 and "give --out a file" in result.err


@pytest.mark.parametrize("bits", ["1", "9", "x"])
def test_a_mean_that_no_form_has(bits: str, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    result = call("sensitivity", tiny, "--out", tmp_path / "s.json", "--target-bits", bits)
    assert result.code == 2 and "--target-bits" in result.err and len(result.err.splitlines()) == 1
