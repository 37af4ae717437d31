"""The same question to original and artifact, as a report shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench import answers, evaluate
from edgepress.pipeline.bench.jobs import QualityJob, ScoringRow
from edgepress.pipeline.bench.stage import bench
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import greedy_tokens
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.report.model import Answer, read
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer, text_windows

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def window(tiny: Path, text: Path) -> tuple[int, ...]:
    return tuple(text_windows(text, tiny, budget=200, length=100)[0].tolist())


def test_a_model_that_chats_is_asked_a_question(tiny: Path, window: tuple[int, ...], tmp_path: Path) -> None:
    """In its own template; one without, or whose template refuses, continues the text."""
    folder = shutil.copytree(tiny, tmp_path / "chat")
    assert answers.asked(folder, window) == answers._passage(window)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ids = answers.asked(folder, window)
    assert load_tokenizer(folder).decode(ids, skip_special_tokens=False) == f"[user] {answers.QUESTION}\n[assistant]"
    assert answers.answer(folder, window, ids, (5,), (6,)).asked == answers.QUESTION
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert answers.asked(folder, window) == answers._passage(window)


def test_a_passage_is_from_the_middle(window: tuple[int, ...]) -> None:
    """With the token that begins a window; of a window too short for it, what there is."""
    assert answers._passage(window) == (window[0], *window[18:50])
    assert answers._passage(window[:10]) == (window[0], *window[1:5])


def test_no_room_no_question(tiny: Path, window: tuple[int, ...], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert answers.asked(folder, window) == ()


def test_each_answers_by_itself(build: Path, tiny: Path, window: tuple[int, ...]) -> None:
    """The original in torch, the artifact from its files, greedily."""
    job = QualityJob((window,), str(tiny), (ScoringRow("onnx", "onnx", str(build / "04-export")),), False, "cpu", window[:9])
    (scored,) = (event.scored for event in evaluate.quality(job) if event.scored)
    prompt = np.array(window[:9])
    assert scored.answers == (
        window[:9],
        tuple(greedy_tokens(load_model(tiny), prompt, evaluate.ANSWER_TOKENS)),
        tuple(Decoder(build / "04-export").greedy(prompt, evaluate.ANSWER_TOKENS)),
    )


def test_an_answer_ends_where_the_model_ends_it(tiny: Path, window: tuple[int, ...]) -> None:
    """Its end token and what follows are not shown; of one that does not end, that it goes on is."""
    words = tuple(load_tokenizer(tiny).encode("a fine day", add_special_tokens=False).ids)
    found = answers.answer(tiny, window, answers._passage(window), (*words, 0, 7, 7), words)
    assert found.original == "a fine day" and found.artifact == "a fine day ..."
    assert found.asked == " ".join(load_tokenizer(tiny).decode(answers._passage(window)).split())


@pytest.mark.families
def test_a_report_has_them(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    options = BenchOptions(
        reference=tiny, text=text, text_tokens=200, repeats=1, prompt_lengths=(8,), new_tokens=2, original_speed=False,
    )  # fmt: skip
    bench(Artifact.load(build / "04-export"), tmp_path, options)
    (answer,) = read(tmp_path / "report.json").first.answers
    assert isinstance(answer, Answer) and answer.asked and answer.original != ""
    told = (tmp_path / "report.md").read_text()
    assert "## Asked the same" in told and f"- original: {answer.original[:10]}" in told
