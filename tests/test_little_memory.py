"""Every stage gives the same with a model that does not fit into memory: ``--memory``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import load, weight_file
from edgepress.pipeline.files import read_json, sha256
from edgepress.pipeline.flags import Options
from edgepress.pipeline.machine import MEMORY, memory_budget, working_within
from edgepress.pipeline.options import (
    BenchOptions,
    ExportOptions,
    HealOptions,
    NarrowOptions,
    PruneOptions,
    QuantizeOptions,
    TuneOptions,
)
from safetensors.torch import load_file

TEXT: dict[str, object] = {"calibration": CALIBRATION_TEXT, "calibration_tokens": 2000}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The models whose weights were put into a file."""
    found: list[object] = []

    def watch(*arguments: object) -> None:
        found.append(arguments)
        weight_file.watch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "watch", watch)
    return found


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pruned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    return stages.run("prune", Artifact.load(tiny), out, PruneOptions(remove_layers=(2,), **TEXT))


@pytest.fixture(scope="module")
def quantized(pruned: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return stages.run("quantize", pruned, tmp_path_factory.mktemp("quantized") / "quantized", QuantizeOptions(method="rtn"))


def weights(folder: Path) -> dict[str, str]:
    """sha256 of each file of weights."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".onnx", ".data")}


def check(name: str, source: Artifact, options: Options, tmp_path: Path, opened: list[object]) -> list[Artifact]:
    """Run a stage with and without memory, and compare what it wrote."""
    usual = stages.run(name, source, tmp_path / "usual", options)
    assert not opened
    with working_within(1_000_000):
        sparing = stages.run(name, source, tmp_path / "sparing", options)
    assert opened and weights(sparing.path) == weights(usual.path)
    return [usual, sparing]


@pytest.mark.parametrize("criterion", ["healed", "greedy", "bi", "angular"])
def test_prune(criterion: str, tiny: Path, tmp_path: Path, opened: list[object]) -> None:
    options = PruneOptions(criterion=criterion, remove_count=2, shortlist=2, greedy_tokens=300, **TEXT)
    usual, sparing = check("prune", Artifact.load(tiny), options, tmp_path, opened)
    assert sparing.steps[-1].facts["removed_layers"] == usual.steps[-1].facts["removed_layers"]


def test_heal(pruned: Artifact, tiny: Path, tmp_path: Path, opened: list[object]) -> None:
    usual, sparing = check("heal", pruned, HealOptions(original=tiny, **TEXT), tmp_path, opened)
    assert sparing.steps[-1].facts == usual.steps[-1].facts


def test_narrow(tiny: Path, tmp_path: Path, opened: list[object]) -> None:
    """But for the order of sums: more windows are read together."""
    options, made = NarrowOptions(remove_channels=0.25, **TEXT), dict[int | None, dict[str, torch.Tensor]]()
    for budget in (None, 1_000_000):
        with working_within(budget):
            folder = stages.run("narrow", Artifact.load(tiny), tmp_path / f"{budget}", options).path
        made[budget] = load_file(folder / "model.safetensors")
    usual, sparing = made.values()
    assert opened and usual.keys() == sparing.keys()
    assert all(torch.allclose(sparing[name], tensor, atol=1e-4) for name, tensor in usual.items())


@pytest.mark.parametrize("way", [{"max_growth": 0.02}, {"target_bits": 5.0}])
def test_quantize(way: dict[str, float], tiny: Path, tmp_path: Path, opened: list[object]) -> None:
    options = QuantizeOptions(method="rtn", **way, **TEXT)
    usual, sparing = check("quantize", Artifact.load(tiny), options, tmp_path, opened)
    assert sparing.steps[-1].facts == usual.steps[-1].facts


def test_tune(quantized: Artifact, tiny: Path, tmp_path: Path, opened: list[object]) -> None:
    options = TuneOptions(original=tiny, tune_tokens=2000, **TEXT)
    check("tune", quantized, options, tmp_path, opened)


@pytest.mark.families
def test_export_and_bench(quantized: Artifact, tiny: Path, tmp_path: Path) -> None:
    """Export reads matrix by matrix in any case; the portable graph needs a whole model; bench has processes of its own."""
    for exporter in ("fused", "portable"):
        usual = stages.run("export", quantized, tmp_path / exporter, ExportOptions(exporter=exporter))
        with working_within(1_000_000):
            sparing = stages.run("export", quantized, tmp_path / f"{exporter}-sparing", ExportOptions(exporter=exporter))
        assert weights(sparing.path) == weights(usual.path)
    options = BenchOptions(reference=tiny, text_tokens=600, repeats=1, prompt_lengths=(16,), new_tokens=4, original_speed=False)
    rows = []
    for budget in (None, 1_000_000):
        with working_within(budget):
            report = stages.run("bench", usual, tmp_path / f"bench-{budget}", options)
        rows.append(read_json(report.path / "report.json")["stages"])
    assert [row["name"] for row in rows[0]] == [row["name"] for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        assert one["kl_mean"] == pytest.approx(other["kl_mean"], rel=1e-3, abs=1e-6)


def test_the_memory_is_said_by_a_flag(call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    """For the command alone, and for the processes that it starts."""
    seen: list[int | None] = []
    monkeypatch.setattr("edgepress.pipeline.cli.commands._stage", lambda *_: seen.append(memory_budget()) or 0)
    assert call("prune", tiny, tmp_path / "out", "--memory", "3GB", "--remove-count", 1).code == 0
    assert seen == [3_000_000_000] and MEMORY not in os.environ
    refused = call("prune", tiny, tmp_path / "out", "--memory", "much")
    assert refused.code == 2 and "--memory takes a size, as 90MB or 1.2GB, not 'much'" in refused.err
