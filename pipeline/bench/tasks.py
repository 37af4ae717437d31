"""Tasks of lm-evaluation-harness on the shipped ONNX files: an LM adapter, and the harness's figures with standard errors."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import lm_eval
import numpy as np
from edgepress.pipeline.bench.jobs import TaskFigure, TaskFigures, TasksJob
from edgepress.pipeline.documents import short_line
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import JsonObject, read_json, real
from edgepress.pipeline.metrics.scores import log_softmax
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.progress import progress
from edgepress.pipeline.registry import suggestion
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import beginning, load_tokenizer
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

# Logits of one batch, in numbers: a quarter of a gigabyte.
BATCH_LOGITS = 1 << 26
BATCH_ROWS = 16


@dataclass(frozen=True)
class _Prompt:
    """One continuation to generate: of the request ``number``, up to ``count`` tokens or one of the texts ``stops``."""

    number: int
    ids: list[int]
    count: int
    stops: list[str]


class OnnxLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of an artifact. Scores in right-padded batches; generates greedily, prompts of equal length together."""

    def __init__(self, folder: Path, threads: int = 0, target: str = "cpu") -> None:
        super().__init__()
        self.decoder = Decoder(folder, threads=threads, target=target)
        self._tokenizer = load_tokenizer(folder)
        start = beginning(self._tokenizer)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        ends = end_tokens(folder)
        self._end = self._special(config, "eos_token", min(ends) if ends else None)
        self._start = self._special(config, "bos_token", start[0] if start else self._end)

    def _special(self, config: JsonObject, name: str, fallback: int | None) -> int:
        text = config.get(name)
        text = text.get("content") if isinstance(text, dict) else text
        token = self._tokenizer.token_to_id(text) if text else None
        return int(token if token is not None else fallback or 0)

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without a context, as the harness's own backend chooses it: BOS, else EOS."""
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Ids of a text; BOS where the tokenizer adds one and the text does not bring it."""
        if add_special_tokens is None:
            first = self._tokenizer.id_to_token(self._start)
            add_special_tokens = not (first and string.startswith(first))
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each (texts, context ids, continuation ids)."""
        rows = [np.array((context + following)[-(self.decoder.context + 1) :][:-1]) for _, context, following in requests]
        answers: dict[int, tuple[float, bool]] = {}
        for batch in progress(self._batches(rows), "loglikelihood", "batch"):
            for index, logits in zip(batch, self.decoder.forward([rows[i] for i in batch]), strict=True):
                following = np.array(requests[index][2])
                scores = log_softmax(logits[-len(following) :])
                nats = scores[np.arange(len(following)), following].sum()
                answers[index] = float(nats), bool((scores.argmax(-1) == following).all())
        return [answers[i] for i in range(len(requests))]

    def _batches(self, rows: list[np.ndarray]) -> list[list[int]]:
        """Indices of rows of similar length, the longest first, within BATCH_ROWS and BATCH_LOGITS."""
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            size = max(1, min(BATCH_ROWS, BATCH_LOGITS // (self._tokenizer.get_vocab_size() * len(rows[index]))))
            if batches and len(batches[-1]) < min(size, BATCH_ROWS):
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats, in windows of the context as the harness cuts them."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.decoder.context, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop text. Raises OptionError for a task that samples."""
        prompts = []
        for number, request in enumerate(requests):
            text, given = request.args
            settings = normalize_gen_kwargs(given, 256)
            if settings.get("do_sample"):
                raise OptionError("this task samples its answers, and only greedy generation is offered; leave it out of --tasks")
            count = min(settings["max_gen_toks"], self.decoder.context - 1)
            ids = self.tok_encode(text)[-(self.decoder.context - count) :]
            stops = handle_stop_sequences(settings.get("until"), self._tokenizer.id_to_token(self._end))
            prompts.append(_Prompt(number, ids, count, stops))
        answers = [""] * len(requests)
        prompts.sort(key=lambda prompt: len(prompt.ids))
        for _, same in groupby(prompts, key=lambda prompt: (len(prompt.ids), prompt.count)):
            group = list(same)
            for first in range(0, len(group), BATCH_ROWS):
                batch = group[first : first + BATCH_ROWS]
                for prompt, text in zip(batch, self._generate(batch), strict=True):
                    answers[prompt.number] = text
        return answers

    def _generate(self, batch: list[_Prompt]) -> list[str]:
        tokens: list[list[int]] = [[] for _ in batch]
        texts: list[str | None] = [None] * len(batch)
        steps = self.decoder.greedy_batch(np.array([prompt.ids for prompt in batch]))
        for step in range(batch[0].count):
            for row, token in enumerate(next(steps)):
                if texts[row] is not None:
                    continue
                tokens[row].append(int(token))
                text = self._tokenizer.decode(tokens[row])
                stopped = any(stop and stop in text for stop in batch[row].stops)
                if token == self._end or stopped or step + 1 == batch[row].count:
                    texts[row] = str(postprocess_generated_text(text, batch[row].stops, None))
            if all(text is not None for text in texts):
                break
        return [text or "" for text in texts]


def evaluate(job: TasksJob) -> Iterator[TaskFigures]:
    """Run tasks on an artifact."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = OnnxLM(Path(job.folder), job.threads, job.target)
    yield TaskFigures(run(model, job.tasks, job.files, job.limit))


def run(model: LM, tasks: Sequence[str], files: Sequence[str], limit: int) -> dict[str, TaskFigure]:
    """The harness's metrics of any of its models, by ``task.metric``. Raises OptionError for a task that it does not know.

    tasks: the harness's names, or .yaml files in its format. files: .jsonl documents, in the order of tasks, in place of what
    the harness would download; or none. limit: documents of each task at most, 0 for all.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # its pool is forked while the runtime's threads run, and hangs now and then
    local = [local_task(name, Path(file)) for name, file in zip(tasks, files, strict=True)] if files else []
    manager = TaskManager(include_defaults=False) if local else _manager()
    if not local:
        check_names(tasks, False)
    chosen: list[JsonObject | str] = [*local] or [*tasks]
    results = simple_evaluate(
        model, tasks=chosen, limit=limit or None, task_manager=manager, log_samples=False, bootstrap_iters=1000
    )
    figures = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind != "none" or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            figures[f"{task}.{metric}"] = TaskFigure(float(value), float(error) if isinstance(error, int | float) else None)
    return figures


@cache
def _manager() -> TaskManager:
    return TaskManager()  # reads thousands of files


def _unknown(name: str, manager: TaskManager) -> OptionError:
    return OptionError(f"lm-evaluation-harness has no task '{name}'{suggestion(name, manager.all_tasks)}")


def check_names(tasks: Sequence[str], with_files: bool) -> None:
    """Raise OptionError for a task that the harness does not know, and for a file that defines none.

    with_files: for documents of ours, which only a single task can have. The harness's index is read only if need be.
    """
    for name in tasks:
        in_a_file = Path(name).is_file() or _named_as_its_file(name) is not None
        if not in_a_file and not with_files and name in _manager().all_tasks:
            continue
        if not isinstance(_read(_definition(name)).get("task"), str) and with_files:
            raise OptionError(f"--task-files gives documents for single tasks, and '{name}' stands for several; name its tasks")


def _named_as_its_file(name: str) -> Path | None:
    """The harness's file NAME.yaml that defines the task or group NAME; most are named so, and some that are define another."""
    if Path(name).name != name:
        return None
    for file in (Path(lm_eval.__file__).parent / "tasks").rglob(f"{glob.escape(name)}.yaml"):
        with suppress(OptionError):
            content = _read(file)
            if name in (content.get("task"), content.get("group")):
                return file
    return None


def _definition(name: str) -> Path:
    """The file that defines a task. Raises OptionError for none."""
    if (file := Path(name) if Path(name).is_file() else _named_as_its_file(name)) is not None:
        return file
    if Path(name).suffix in (".yaml", ".yml"):
        raise OptionError(f"no such file: {name}; --tasks takes names of lm-evaluation-harness, or .yaml files in its format")
    known = _manager().task_index.get(name)  # named otherwise than its file: the whole index is read
    if known is not None and known.yaml_path is None:
        raise OptionError(f"--task-files gives documents for single tasks, and '{name}' stands for several; name its tasks")
    if known is None:
        raise _unknown(name, _manager())
    return Path(known.yaml_path)


def _read(file: Path) -> JsonObject:
    """A file of the harness's format, without running the code that it may name. Raises OptionError."""
    try:
        content = load_yaml(file, resolve_func=False)
    except Exception as error:  # YAML's errors and the harness's own
        raise OptionError(f"--tasks: {file} cannot be read ({short_line(str(error))}); correct it") from error
    if not isinstance(content, dict) or not {"task", "group"} & content.keys():
        raise OptionError(f"--tasks: {file} defines no task of lm-evaluation-harness (it has no 'task'); give another one")
    return dict(content)


def local_task(name: str, file: Path) -> JsonObject:
    """The harness's own task (prompts, metrics) on documents from a local .jsonl file."""
    config = dict(load_yaml(_definition(name), resolve_func=True))
    for key in ("tag", "group", "dataset_name", "training_split", "validation_split", "fewshot_split"):
        config.pop(key, None)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(real(file))}}, "test_split": "test"}
    return {**config, **data}
