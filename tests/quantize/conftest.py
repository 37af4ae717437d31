"""A real run of gptqmodel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from quantizing import GptqRun, hostile, run_gptqmodel


@pytest.fixture(scope="session")
def quantized(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GptqRun]:
    folder = tmp_path_factory.mktemp("gptq")
    yield run_gptqmodel(hostile(tiny, folder), folder, text, bits=4, group_size=64)
