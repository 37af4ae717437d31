"""Scores of rows are the same whether windows are read whole or by parts, and the original is loaded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import machine, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench import evaluate, quality
from edgepress.pipeline.bench.jobs import QualityFigures, QualityJob, ScoringRow
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.checkpoint import load
from edgepress.pipeline.metrics import torch_scores
from edgepress.pipeline.options import BenchOptions, PruneOptions
from edgepress.pipeline.text.windows import text_windows
from families import FAMILIES, family_config


def figures(build: Path, tiny: Path, text: Path) -> dict[str, QualityFigures]:
    windows = tuple(tuple(row.tolist()) for row in text_windows(text, tiny, budget=200, length=100))
    rows = (
        ScoringRow("original", "torch", str(tiny)),
        ScoringRow("quantized", "torch", str(build / "03-quantize")),
        ScoringRow("onnx", "onnx", str(build / "04-export")),
    )
    events = evaluate.quality(QualityJob(windows, str(tiny), rows, False, "cpu"))
    return {event.scored.key: event.scored.figures for event in events if event.scored}


@pytest.fixture(scope="module")
def whole(build: Path, tiny: Path, text: Path) -> dict[str, QualityFigures]:
    return figures(build, tiny, text)


def test_windows_by_parts(
    build: Path, tiny: Path, text: Path, whole: dict[str, QualityFigures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's figures to the last digit, onnxruntime's to the rounding of a read through the cache."""
    monkeypatch.setattr(machine, "_FEWEST", 1)
    monkeypatch.setattr(machine, "_LOGITS", 10 * 5120)
    loaded: list[Path] = []
    real = load.load_model
    monkeypatch.setattr(load, "load_model", lambda folder, *rest: loaded.append(folder) or real(folder, *rest))
    parts = figures(build, tiny, text)
    assert loaded == [tiny]  # the others' blocks are in memory one after the other
    assert (parts["original"], parts["quantized"]) == (whole["original"], whole["quantized"])
    assert parts["onnx"].kl_mean == pytest.approx(whole["onnx"].kl_mean, rel=1e-3)
    assert parts["onnx"].tokens == whole["onnx"].tokens == parts["original"].tokens
    assert parts["original"].kl_mean == 0 and parts["original"].top1_agreement == 1
    assert len(parts["onnx"].greedy_match_tokens or ()) == 2


def parts_of(model: evaluate._Model, windows: list[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([logits for _, logits in model.parts(window)]) for window in windows]


def check_streamed(folder: Path, streamed: bool | None) -> None:
    """What is scored is what a model that is in memory whole says, whichever way a family takes; streamed None: either."""
    windows = [np.arange(5, 5 + length) for length in (40, 40, 11)]
    model = evaluate._Models(False, "cpu").open(ScoringRow("row", "torch", str(folder)), folder, windows)
    assert streamed in (isinstance(model, evaluate._Streamed), None)
    for found, expected in zip(parts_of(model, windows), parts_of(evaluate._Torch(str(folder), False), windows), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * expected.std()


def test_streamed_scores_of_packed_weights(build: Path) -> None:
    check_streamed(build / "03-quantize", True)


# A mixture of experts has its tensors merged when it is loaded: it is in memory whole.
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_streamed_scores_of_other_families(family: str, tmp_path: Path, random_model: Callable[..., Path]) -> None:
    check_streamed(random_model(family_config(family), tmp_path / family), family != "mixtral")


@pytest.mark.families
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_streamed_scores_of_every_family(family: str, tmp_path: Path, random_model: Callable[..., Path]) -> None:
    check_streamed(random_model(family_config(family), tmp_path / family), None)


def test_a_model_whose_blocks_cannot_be_told_is_read_whole(
    build: Path, tiny: Path, text: Path, whole: dict[str, QualityFigures], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(model: object) -> None:
        raise torch_scores.ModelError("no blocks")

    monkeypatch.setattr(torch_scores, "Blocks", unknown)
    assert figures(build, tiny, text)["quantized"].perplexity == pytest.approx(whole["quantized"].perplexity, rel=1e-6)


@pytest.mark.parametrize(("bits", "names"), [({"4": 28}, ["onnx_level_0", "onnx"]), ({"8": 28}, ["onnx"])])
def test_eight_bits_are_not_scored_at_level_0(
    bits: dict[str, int], names: list[str], build: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onnxruntime is thirty times slower there, and the export has proven those figures."""
    artifact = Artifact.load(build / "04-export")
    monkeypatch.setitem(artifact.steps[1].facts, "bits", bits)
    subject = Subject(artifact, "mine", (), ())
    rows = quality._rows(subject, BenchOptions(reference=tiny))
    assert [row.name for row in rows] == ["original", *names]
    assert ("stages.onnx_level_0" in subject.missing) == ("8" in bits)


def test_a_stage_that_changed_nothing_is_not_scored_again(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Its folder has the original's weights beside a record of what was tried; of the two the original is scored."""
    options = PruneOptions(max_loss=0.0, calibration=text, calibration_tokens=512)
    kept = stages.run("prune", Artifact.load(tiny), tmp_path / "kept", options)
    subject = Subject(Artifact.load(build / "04-export"), "mine", (), (kept.path, build / "01-prune", build / "03-quantize"))
    original, same, pruned, quantized, *_ = quality._rows(subject, BenchOptions(reference=tiny))
    assert kept.identity() != Artifact.load(tiny).identity()
    assert same.key == original.key and len({row.key for row in (original, pruned, quantized)}) == 3
    assert [row.folder for row in quality._different([original, same, pruned]).values()] == [tiny, build / "01-prune"]
