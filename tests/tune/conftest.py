"""Fixtures of tuning: a small quantized model, its original, and options that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions, TuneOptions


@pytest.fixture(scope="session")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model rounded to 2 bits."""
    options = QuantizeOptions(method="rtn", bits=2, group_size=32)
    return stages.run("quantize", Artifact.load(tiny), tmp_path_factory.mktemp("tune") / "quantized", options)


@pytest.fixture(scope="session")
def options() -> Callable[..., TuneOptions]:
    """Options with an original, little text, and what a test changes."""

    def make(original: Path | None, **changes: object) -> TuneOptions:
        text = {"calibration": CALIBRATION_TEXT, "calibration_tokens": 4096}
        few = {"original": original, "tune_tokens": 12288, "tune_rate": 0.02} | text
        return TuneOptions(**(few | changes))

    return make


@pytest.fixture(autouse=True)
def _short_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 1024)
