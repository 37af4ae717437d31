"""Checkpoints that were quantized and exported, once for all tests of the exporters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from families import TINY
from transformers import LlamaConfig

Made = tuple[Artifact, Artifact]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[..., Made]:
    """(quantized, exported) of a checkpoint folder."""

    @cache
    def run(source: Path, method: str, exporter: str = "auto") -> Made:
        folder = tmp_path_factory.mktemp("made")
        options = QuantizeOptions(method=method, group_size=32 if 32 in METHODS[method].groups else None)
        packed = stages.run("quantize", Artifact.load(source), folder / "packed", options)
        exported = stages.run("export", packed, folder / "onnx", ExportOptions(exporter=exporter, text=text))
        return packed, exported

    return run


@pytest.fixture(scope="session")
def shallow(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, for the portable graph: torch traces every one."""
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 2}, tie_word_embeddings=False)
    return random_model(config, tmp_path_factory.mktemp("models") / "shallow")


@pytest.fixture(scope="session")
def fused(make: Callable[..., Made], tiny: Path) -> Made:
    return make(tiny, "rtn")
