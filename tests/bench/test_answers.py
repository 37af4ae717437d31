"""The same question to original and artifact, as a report shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench import answers, evaluate
from edgepress.pipeline.bench.jobs import Continuations, QualityJob, ScoringRow
from edgepress.pipeline.bench.stage import bench
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import greedy_tokens, logits_of
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.report.model import Answer, Parting, read
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer, text_windows

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def window(tiny: Path, text: Path) -> tuple[int, ...]:
    return tuple(text_windows(text, tiny, budget=200, length=100)[0].tolist())


def test_a_model_that_chats_is_asked_questions(tiny: Path, window: tuple[int, ...], tmp_path: Path) -> None:
    """In its own template; one without, or whose template refuses, continues the text in three places, if it has so many."""
    folder, tokenizer = shutil.copytree(tiny, tmp_path / "chat"), load_tokenizer(tiny)
    read = {ids: " ".join(tokenizer.decode(ids).split()) for ids in [answers._passage(window)]}
    assert answers.asked(folder, [window]) == read
    others = [window, *(window[first:] for first in (3, 5, 7, 9))]
    assert list(answers.asked(folder, others)) == [answers._passage(others[number]) for number in (0, 2, 4)]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    found = answers.asked(folder, others)
    assert tuple(found.values()) == answers.QUESTIONS
    for ids, question in found.items():
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"[user] {question}\n[assistant]"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert answers.asked(folder, [window]) == read


def test_a_passage_is_from_the_middle(window: tuple[int, ...]) -> None:
    """With the token that begins a window; of a window too short for it, what there is."""
    assert answers._passage(window) == (window[0], *window[18:50])
    assert answers._passage(window[:10]) == (window[0], *window[1:5])


def test_no_room_no_question(tiny: Path, window: tuple[int, ...], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert answers.asked(folder, [window]) == {}


def test_each_answers_by_itself(build: Path, tiny: Path, window: tuple[int, ...]) -> None:
    """The original in torch, the artifact from its files, greedily."""
    asked = window[:9], window[:5]
    job = QualityJob((window,), str(tiny), (ScoringRow("onnx", "onnx", str(build / "04-export")),), False, "cpu", asked)
    (scored,) = (event.scored for event in evaluate.quality(job) if event.scored)
    model = load_model(tiny)
    assert [one.asked for one in scored.answers] == list(asked)
    for found in scored.answers:
        prompt = np.array(found.asked)
        assert found.original == tuple(greedy_tokens(model, prompt, evaluate.ANSWER_TOKENS))
        assert found.artifact == tuple(Decoder(build / "04-export").greedy(prompt, evaluate.ANSWER_TOKENS))
        pairs = list(zip(found.original, found.artifact, strict=True))
        place = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
        assert evaluate.in_common(found.original, found.artifact) == place and (found.held is None) == (place == len(pairs))
        if place < len(pairs):
            ids = np.array([*found.asked, *found.original[:place]])
            chances = torch.softmax(torch.from_numpy(logits_of(model, ids, keep=1)[0]), -1)
            own, other = (float(chances[token]) for token in pairs[place])
            assert found.held == pytest.approx([own, other if other >= 0.01 else 0.0], abs=1e-5)


def test_where_answers_part_the_originals_chances_are_said() -> None:
    """A near tie is no mistake; a word that the original did not think of is one."""
    chances = [{5: 0.9, 8: 0.05}, {6: 0.41, 7: 0.4}, {3: 1.0}]
    assert evaluate._answers((1,), chances, [5, 7, 2]) == Continuations((1,), (5, 6, 3), (5, 7, 2), (0.41, 0.4))
    assert evaluate._answers((1,), chances, [2, 7, 2]).held == (0.9, 0.0)
    assert evaluate._answers((1,), chances, [5, 6, 3]).held is None


def test_an_answer_ends_where_the_model_ends_it(tiny: Path, window: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end token and what follows are not shown; of one that does not end, that it goes on is."""
    words = tuple(load_tokenizer(tiny).encode("a fine day", add_special_tokens=False).ids)
    passage, original = answers._passage(window), (*words, 0, 7, 7)
    found = answers.answer(tiny, "a passage", Continuations(passage, original, words))
    assert found.original == "a fine day" and found.artifact == "a fine day ..." and found.parting is None
    assert found.asked == "a passage"
    other = (words[0], words[0], *words[2:], 0, 7, 7)
    parting = answers.answer(tiny, "a passage", Continuations(passage, original, other, (0.5, 0.25))).parting
    assert parting == Parting(*(load_tokenizer(tiny).decode([ids[1]]) for ids in (words, words[:1] * 2)), 0.5, 0.25)
    late = (*words, 0, 8, 7)  # it is not read so far
    assert answers.answer(tiny, "a passage", Continuations(passage, original, late, (0.5, 0.25))).parting is None
    monkeypatch.setattr(answers, "end_tokens", lambda _: {0, 7})
    ended = ((words[0], 0), (words[0], 7))  # both end there
    assert answers.answer(tiny, "a passage", Continuations(passage, *ended, (0.5, 0.25))).parting is None


def test_two_artifacts_of_which_one_chats(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    """They are asked the same, whatever the other's template would make of it."""
    other = shutil.copytree(build / "04-export", tmp_path / "other")
    (other / "chat_template.jinja").write_text(TEMPLATE)
    options = BenchOptions(
        reference=tiny, text=text, text_tokens=200, repeats=1, prompt_lengths=(8,), new_tokens=2, original_speed=False,
        compare_with=(other,),
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    bench(Artifact.load(build / "04-export"), tmp_path / "out", options)
    report = read(tmp_path / "out" / "report.json").first
    assert [one.asked for one in report.answers] == list(answers.QUESTIONS)


@pytest.mark.families
def test_a_report_has_them(build: Path, tiny: Path, text: Path, tmp_path: Path) -> None:
    options = BenchOptions(
        reference=tiny, text=text, text_tokens=200, repeats=1, prompt_lengths=(8,), new_tokens=2, original_speed=False,
    )  # fmt: skip
    bench(Artifact.load(build / "04-export"), tmp_path, options)
    found = read(tmp_path / "report.json").first.answers
    assert found and all(isinstance(answer, Answer) and answer.asked and answer.original != "" for answer in found)
    (answer, *_) = found
    told = (tmp_path / "report.md").read_text()
    assert "## Asked the same" in told and f"- original: {answer.original[:10]}" in told
