"""Text from an artifact in Python."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError, OptionError, TextError
from edgepress.pipeline.options import ExportOptions, RunOptions
from edgepress.pipeline.runtime.generate import TextModel, stream

PROMPT = "The old house stood"


@pytest.fixture(scope="module")
def folder(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "onnx"
    return stages.run("export", Artifact.load(tiny), out, ExportOptions(text=text)).path


def test_one_model_continues_several_prompts(folder: Path) -> None:
    """Each from its beginning: nothing of a former one is left in the cache, finished or not."""
    model = TextModel(folder)
    first = list(model.stream(PROMPT, 12))
    next(model.stream("Another text", 12))
    assert list(model.stream(PROMPT, 12)) == first and 0 < len(first) <= 12
    assert list(model.stream(PROMPT, 12, temperature=0.8, seed=1)) == list(model.stream(PROMPT, 12, temperature=0.8, seed=1))


def test_the_command_line_streams_the_same(folder: Path) -> None:
    """After the prompt, which a terminal shows too."""
    pieces = list(stream(folder, PROMPT, RunOptions(max_new_tokens=12)))
    assert pieces == [PROMPT, *TextModel(folder, threads=1).stream(PROMPT, 12)]


def test_errors_come_before_the_first_piece(folder: Path, tmp_path: Path) -> None:
    model = TextModel(folder)
    with pytest.raises(TextError, match="prompt is empty"):
        model.stream("")
    with pytest.raises(OptionError, match="exceed the context of 256"):
        model.stream(PROMPT, max_new_tokens=256)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextModel(tmp_path)
