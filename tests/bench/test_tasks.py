"""Tasks on the ONNX files give what the harness's own torch backend gives on the same float model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.jobs import TaskNamesJob
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import BenchOptions, ExportOptions, QuantizeOptions

pytest.importorskip("lm_eval")

QUESTIONS = [
    ("Which of these can a man ride?", ["a stone", "a horse", "a river of milk", "the moon"], "B"),
    ("What falls from the sky in winter?", ["snow", "bread", "a chair"], "A"),
    ("Who sits upon a throne?", ["the cat", "a very small and very old spoon", "the king", "nobody"], "C"),
    ("What is it that the fire gives to the poor traveller on a cold night in November?", ["warmth", "a letter"], "A"),
    ("What does a ship cross?", ["the sea", "the ceiling", "the piano", "the hat"], "A"),
]
PASSAGES = [
    "She had waited for him all the morning, and when at last he came into the room she could not speak to him",
    "The old house stood upon the hill, and nobody had lived in it since the death of the old man",
    "It was a cold night, and the rain fell upon the roof of the house",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Documents in the fields of arc_easy and of lambada_openai."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"id": str(i), "question": q, "choices": {"text": c, "label": list("ABCD")[: len(c)]}, "answerKey": a}
        for i, (q, c, a) in enumerate(QUESTIONS)
    ]
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return [folder / "arc.jsonl", folder / "lambada.jsonl"]


@pytest.fixture(scope="module")
def exported(reference: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model as float ONNX."""
    folder = tmp_path_factory.mktemp("float")
    packed = stages.run("quantize", Artifact.load(reference), folder / "packed", QuantizeOptions(method="none"))
    return stages.run("export", packed, folder / "onnx", ExportOptions(text=text))


@pytest.fixture(scope="module")
def models(exported: Artifact, reference: Path) -> tuple[Any, Any]:
    """Ours on the ONNX files and the harness's on the checkpoint."""
    from edgepress.pipeline.bench.tasks import OnnxLM
    from lm_eval.models.huggingface import HFLM

    return OnnxLM(exported.path, threads=1), HFLM(pretrained=str(reference), dtype="float32", device="cpu", batch_size=4)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def test_loglikelihood_agrees(models: tuple[Any, Any]) -> None:
    """Short and long, no context, a context longer than the model's, a greedy continuation."""
    ours, theirs = models
    greedy = theirs.generate_until(requests("generate_until", (PASSAGES[0], {"until": [], "max_gen_toks": 4})))[0]
    pairs = [
        *((text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in PASSAGES),
        ("", "The house"),
        (PASSAGES[1] + " ", "and was never seen again"),
        (" ".join(PASSAGES) * 12, " and so it was"),
        (PASSAGES[0], greedy),
    ]
    scores = ours.loglikelihood(requests("loglikelihood", *pairs))
    reference = theirs.loglikelihood(requests("loglikelihood", *pairs))
    assert [nats for nats, _ in scores] == pytest.approx([nats for nats, _ in reference], abs=1e-3)
    assert [same for _, same in scores] == [same for _, same in reference] and scores[-1][1]


def test_rolling_loglikelihood_agrees(models: tuple[Any, Any]) -> None:
    """Also over several windows of the context of 512."""
    texts = [(PASSAGES[0],), (" ".join(PASSAGES) * 12,)]
    ours, theirs = (model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for model in models)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generation_agrees(models: tuple[Any, Any]) -> None:
    """Several at once, of equal and of other lengths, with and without a stop text."""
    settings = [{"until": ["."], "max_gen_toks": 24}, {"until": [" the", "\n"], "max_gen_toks": 12}]
    given = [(text, setting) for setting in settings for text in [*PASSAGES, PASSAGES[0]]]
    ours, theirs = (model.generate_until(requests("generate_until", *given)) for model in models)
    assert ours == theirs and any(ours)


def test_tasks_agree(models: tuple[Any, Any], files: list[Path]) -> None:
    """The harness's prompts and metrics on local documents, through both."""
    from edgepress.pipeline.bench.tasks import run

    ours, theirs = (run(model, ["arc_easy", "lambada_openai"], [str(f) for f in files], 0) for model in models)
    assert set(ours) == {"arc_easy.acc", "arc_easy.acc_norm", "lambada_openai.perplexity", "lambada_openai.acc"}
    for name, figure in ours.items():
        assert figure.value == pytest.approx(theirs[name].value, rel=1e-3), name
    assert ours["arc_easy.acc"].standard_error == pytest.approx(theirs["arc_easy.acc"].standard_error)


def test_unknown_task_is_named(monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> None:
    """With the nearest that the harness has; its whole index takes long to read, so here it is a short one."""
    from edgepress.pipeline.bench import tasks
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=False)
    monkeypatch.setattr(type(index), "all_tasks", property(lambda self: ["arc_easy", "piqa"]))
    monkeypatch.setattr(tasks, "_manager", lambda: index)
    for given in ([], [str(files[0])]):
        with pytest.raises(OptionError, match=r"no task 'arc_esy' \(did you mean 'arc_easy'\?\)"):
            tasks.run(None, ["arc_esy"], given, 0)


@pytest.mark.parametrize(("given", "says"), [("a: [", "cannot be read"), ("a: 1", "defines no task")])
def test_a_file_that_defines_no_task(given: str, says: str, tmp_path: Path) -> None:
    """Its reason is said before anything is measured."""
    from edgepress.pipeline.bench.tasks import check_names

    (tmp_path / "mine.yaml").write_text(given)
    with pytest.raises(OptionError, match=says):
        check_names([str(tmp_path / "mine.yaml")], False)


def test_a_group_of_tasks_takes_no_documents_of_ours(tmp_path: Path) -> None:
    from edgepress.pipeline.bench.tasks import check_names

    group = tmp_path / "group.yaml"
    group.write_text("group: mine\ntask: [arc_easy, piqa]")
    check_names([str(group)], False)
    with pytest.raises(OptionError, match="stands for several; name its tasks"):
        check_names([str(group)], True)


def test_names_of_tasks_are_split_at_commas(tmp_path: Path) -> None:
    """As they are given in the documentation; a flag given again adds to them. A file may have commas in its name."""
    assert make(BenchOptions, {"tasks": ["arc_easy, piqa,", "wikitext"]}).tasks == ("arc_easy", "piqa", "wikitext")
    file = tmp_path / "a, b.yaml"
    file.write_text("task: mine")
    assert make(BenchOptions, {"tasks": [str(file)], "task_files": str(file)}).tasks == (str(file),)
    assert make(BenchOptions, {"tasks": ["x"], "task_files": str(file)}).task_files == (file,)
    assert make(BenchOptions, {"prompt_lengths": "8, 16,"}).prompt_lengths == (8, 16)
    with pytest.raises(OptionError, match="--prompt-lengths takes a whole number"):
        make(BenchOptions, {"prompt_lengths": ","})


def test_a_file_that_defines_another_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness knows a task by what its file says; nothing is trusted but that."""
    from edgepress.pipeline.bench import tasks

    (tmp_path / "tasks" / "other").mkdir(parents=True)
    (tmp_path / "tasks" / "nurse.yaml").write_text("task: kormedmcqa_nurse")
    (tmp_path / "tasks" / "piqa.yaml").write_text("dataset_path: template")
    (tmp_path / "tasks" / "other" / "piqa.yaml").write_text("task: piqa")
    (tmp_path / "tasks" / "many.yaml").write_text("group: many\ntask: [piqa]")
    index = SimpleNamespace(all_tasks=["kormedmcqa_nurse"], task_index={})
    monkeypatch.setattr(tasks, "_manager", lambda: index)
    monkeypatch.setattr(tasks.lm_eval, "__file__", str(tmp_path / "__init__.py"))
    tasks.check_names(["piqa", "many", "kormedmcqa_nurse"], False)
    for with_files in (True, False):
        with pytest.raises(OptionError, match="has no task 'nurse'"):
            tasks.check_names(["nurse"], with_files)


@pytest.mark.parametrize("with_files", [True, False])
def test_a_task_file_that_is_not_there(with_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its whole path, too."""
    from edgepress.pipeline.bench import tasks

    monkeypatch.setattr(tasks, "_manager", lambda: SimpleNamespace(all_tasks=[], task_index={}))
    for name in (str(tmp_path / "missing.yaml"), "../missing.yaml", "missing.yml"):
        with pytest.raises(OptionError, match=f"no such file: {re.escape(name)}; --tasks takes"):
            tasks.check_names([name], with_files)
    with pytest.raises(OptionError, match="has no task '/missing'"):
        tasks.check_names(["/missing"], with_files)


def test_tasks_are_looked_up_before_anything_is_measured(
    exported: Artifact, tiny: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process of its own: by bench before it measures, by a build before its first stage."""
    from edgepress.pipeline.bench import subject

    looked_up = []

    def measured(kind: str, job: object, answer: type) -> None:
        looked_up.append((kind, job))
        raise OptionError("lm-evaluation-harness has no task 'arc_esy'; give another one")

    monkeypatch.setattr(subject, "measured", measured)
    for command in (
        ["bench", exported.path, "--out", tmp_path / "out"],
        ["build", tiny, tmp_path / "out", "--remove-layers", "1", "--method", "rtn"],
    ):
        result = call(*command, "--tasks", "arc_esy")
        assert result.code == 2 and result.err.splitlines()[-1].startswith("error: lm-evaluation-harness has no task"), result.err
    assert looked_up == [("task_names", TaskNamesJob(("arc_esy",), False))] * 2
    assert not list(tmp_path.iterdir())


def test_tasks_are_looked_up_once_and_last(
    exported: Artifact, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A build has looked before its first stage, and bench need not again; what can be told at once is told before."""
    from edgepress.pipeline.bench import stage, subject

    def measure(*_: object) -> None:
        raise RuntimeError("measuring")

    looked_up = []
    monkeypatch.setattr(stage, "environment", measure)
    monkeypatch.setattr(subject, "measured", lambda kind, job, answer: looked_up.append(job))
    options = BenchOptions(text=text, text_tokens=64, prompt_lengths=(8,), tasks=("known here alone",))
    for wrong in ({"compare_with": (tiny,)}, {"reference": tiny / "nothing"}, {"stages": (tiny,)}, {"text": tiny / "nothing.txt"}):
        with pytest.raises((InputError, OptionError)):
            stage.bench(exported, tmp_path, replace(options, **wrong))
    assert not looked_up
    with caplog.at_level("INFO", "edgepress"):
        subject.foresee(tiny, options)
        with pytest.raises(RuntimeError, match="measuring"):
            stage.bench(exported, tmp_path, options)
    assert looked_up == [TaskNamesJob(options.tasks, False)]
    assert [record.message for record in caplog.records] == ["bench: looking up in lm-evaluation-harness: known here alone"]


def test_more_threads_than_processors(exported: Artifact, call: Callable[..., Any], tmp_path: Path) -> None:
    """Not found by each process that measures, in turn."""
    result = call("bench", exported.path, "--out", tmp_path / "out", "--threads", "100000")
    assert result.code == 2 and len(result.err.splitlines()) == 2 and "processors of this machine" in result.err


@pytest.mark.families
def test_bench_reports_tasks(exported: Artifact, files: list[Path], text: Path, tmp_path: Path) -> None:
    """Under their own names, with standard errors, from a process of its own."""
    options = BenchOptions(
        text=text,
        text_tokens=64,
        repeats=1,
        prompt_lengths=(8,),
        new_tokens=4,
        tasks=("arc_easy",),
        task_files=(files[0],),
        task_limit=4,
    )
    out = stages.run("bench", exported, tmp_path / "out", options).path
    figure = read_json(out / "report.json")["figures"]["tasks.arc_easy.acc"]
    assert figure["unit"] == "1" and 0 <= figure["median"] <= 1 and figure["standard_error"] > 0
    assert "arc_easy.acc" in (out / "report.md").read_text()


def test_what_is_missing_is_named(exported: Artifact, text: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """Documents that are not there, too few files, and the package."""
    arguments = ["bench", exported.path, "--text", text, "--out", tmp_path / "out", "--tasks", "arc_easy"]
    for extra, says in ((["--task-files", "/nowhere.jsonl"], "/nowhere.jsonl"), (["--task-files", "a,b"], "2 files for 1")):
        result = call(*arguments, *extra)
        assert result.code == 2 and says in result.err
    code = "import sys; sys.modules['lm_eval'] = None; from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install -e '.[tasks]'" in done.stderr and len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "out").exists()
