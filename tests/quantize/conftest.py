"""A real run of gptqmodel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from quantizing import GptqRun, run_gptq


@pytest.fixture(scope="session")
def quantized(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GptqRun]:
    yield run_gptq(tiny, tmp_path_factory.mktemp("gptq"), text, bits=4, group_size=64)
