"""Which matrices need more bits: figures by their definition, and a proposal that quantize takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.scores import log_softmax
from edgepress.pipeline.options import QuantizeOptions, SensitivityOptions
from edgepress.pipeline.quantize.sensitivity import GroupCost, Sensitivity, measure, propose
from edgepress.pipeline.stages import run
from edgepress.pipeline.text.windows import text_windows


@pytest.fixture(scope="module")
def sensitivity(tiny: Path, text: Path) -> Sensitivity:
    return measure(Checkpoint(tiny), SensitivityOptions(bits=2, group_size=32, calibration=text, calibration_tokens=512, extra=0.5))


def test_only_the_group_is_rounded(sensitivity: Sensitivity, tiny: Path, text: Path, tmp_path: Path) -> None:
    """KL of a row is that of a checkpoint in which quantize left all other blocks, and the ends, float."""
    assert [row.group for row in sensitivity.rows] == [f"model.layers.{i}.{x}" for i in range(4) for x in ("self_attn", "mlp")]
    row = sensitivity.rows[5]
    options = QuantizeOptions(
        method="rtn", bits=2, group_size=32, head_bits=16, bits_for=("model.layers.2.mlp.*=2", ".*=16"),
    )  # fmt: skip
    run("quantize", Artifact.load(tiny), tmp_path / "packed", options)
    windows = text_windows(text, tiny, budget=512, shortest=16)
    whole, rounded = Checkpoint(tiny).model(), Checkpoint(tmp_path / "packed").model()
    divergences = []
    with torch.inference_mode():
        for ids in windows:
            p, q = (log_softmax(m(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].numpy()) for m in (whole, rounded))
            divergences.append((np.exp(p) * (p - q)).sum(-1))
    assert row.kl == pytest.approx(float(np.concatenate(divergences).mean()), rel=1e-4)
    assert row.weights == 3 * 64 * 96 and row.kl > 0


def test_proposal_spends_no_more_than_allowed() -> None:
    """By gain for a byte; what does not fit is passed over for what does."""
    rows = [
        GroupCost("a", "a.*", weights=100, kl=1.0, top1=1.0, bytes=50),
        GroupCost("b", "b.*", weights=1000, kl=9.0, top1=1.0, bytes=500),
        GroupCost("c", "c.*", weights=100, kl=0.1, top1=1.0, bytes=50),
    ]
    assert propose(rows, SensitivityOptions(extra=0.2)) == ("a.*=8", "c.*=8")  # 120 bytes of 600
    assert propose(rows, SensitivityOptions(extra=1.0, better_bits=16)) == ("a.*=16", "b.*=16", "c.*=16")
    assert propose(rows, SensitivityOptions(extra=0.0)) == ()


def test_command_prints_what_quantize_takes(call: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path) -> None:
    """The table, the file, and rules that go straight into a recipe."""
    result = call(
        "sensitivity", tiny, "--out", tmp_path / "s.json", "--calibration", text, "--calibration-tokens", "64", "--extra", "0.3"
    )
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "s.json").read_text())
    assert len(content["rows"]) == 8 and content["bits_for"]
    for row in content["rows"]:
        assert f"{row['group']} " in result.out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(result.out[result.out.index("quantize:\n") :] + "  method: rtn\n")
    result = call("build", tiny, tmp_path / "out", "--recipe", recipe)
    assert "Traceback" not in result.err
    bits = Artifact.load(tmp_path / "out" / "01-quantize").steps[-1].facts["bits"]
    assert bits["8"] >= 3 and bits["4"] >= 3


def test_output_must_be_a_file(call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    result = call("sensitivity", tiny, "--out", tmp_path)
    assert result.code == 2 and "give --out a file" in result.err
