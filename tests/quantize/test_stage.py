"""The entry of the quantize stage: which process does the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import stage
from edgepress.pipeline.stages import run


def test_the_process_that_waits_stays_small() -> None:
    """Neither torch nor numpy is loaded by the entry: it waits for hours."""
    look = (
        "import sys, edgepress.pipeline.quantize.stage; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.run])
def test_isolated_methods_alone_leave_this_process(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their row says, and with a scratch folder of the method's name."""
    calls = []
    monkeypatch.setattr(stage, "run_isolated", lambda *arguments: calls.append(arguments) or {})
    (tmp_path / ".out.partial").mkdir()
    stage.quantize(Artifact.load(tiny), tmp_path / ".out.partial", QuantizeOptions(method=method))
    assert bool(calls) == METHODS[method].isolated
    assert all(call[2:] == (method, tmp_path / f".out.{method}") for call in calls)


def test_other_blocks_than_asked_for_are_named(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ends of a model 64 wide cannot have blocks of 128: the log says so in one line, the manifest which matrices."""
    with caplog.at_level("INFO"):
        packed = run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", group_size=128))
    assert packed.steps[-1].facts["other_blocks"] == {"64": ["model.embed_tokens", "lm_head"]}
    assert "quantize: blocks of 64 instead of 128 in model.embed_tokens (64 wide) and 1 more" in caplog.messages
    plain = run("quantize", Artifact.load(tiny), tmp_path / "plain", QuantizeOptions(method="rtn", group_size=32))
    assert "other_blocks" not in plain.steps[-1].facts
