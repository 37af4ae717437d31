"""A build to measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions


@pytest.fixture(scope="session")
def build(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a build without its benchmark."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    pruned = stages.run(
        "prune", Artifact.load(tiny), out / "01-prune", PruneOptions(remove_count=1, calibration=text, calibration_tokens=512)
    )
    packed = stages.run("quantize", pruned, out / "03-quantize", QuantizeOptions(method="rtn", group_size=32))
    stages.run("export", packed, out / "04-export", ExportOptions(text=text, accuracy_level="4"))
    return out
