"""Fixtures of healing: a pruned reference model, options, a short other text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import HealOptions, PruneOptions


@pytest.fixture(scope="session")
def pruned(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The reference model without a run of two layers and one more."""
    options = PruneOptions(remove_layers=(4, 5, 9), calibration=CALIBRATION_TEXT, calibration_tokens=1000)
    return stages.run("prune", Artifact.load(reference), tmp_path_factory.mktemp("heal") / "pruned", options)


@pytest.fixture
def short_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """For healings that are refused: reading all of the shipped other text takes most of their time."""
    monkeypatch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 1600)


@pytest.fixture(scope="session")
def options() -> Callable[..., HealOptions]:
    """Options with an original, few calibration tokens, and what a test changes."""

    def make(original: Path, **changes: object) -> HealOptions:
        return HealOptions(**({"original": original, "calibration_tokens": 6000} | changes))

    return make
