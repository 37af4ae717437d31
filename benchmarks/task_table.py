"""Tasks of lm-evaluation-harness: a checkpoint by the harness's own torch backend, and artifacts made of it, on the same documents.

    python benchmarks/task_table.py CHECKPOINT ARTIFACT [ARTIFACT] --task sciq=sciq.jsonl --task arc_easy=arc.jsonl [--limit 500]

Prints a Markdown table: each task's metric with its standard error, and how far above chance the artifact still is, as a share of
what the checkpoint is. The documents of a task are the first of its file, the same for every row. What is measured is kept in
--work: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact, onnx_folder
from edgepress.pipeline.bench.jobs import TaskFigures
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.tasks import OnnxLM, run
from edgepress.pipeline.files import sha256
from edgepress.pipeline.registry import versions
from lm_eval.api.model import LM

# What is told of a task, and what guessing gives.
METRICS = {
    "sciq": ("acc", 0.25), "arc_easy": ("acc", 0.25), "arc_challenge": ("acc_norm", 0.25), "openbookqa": ("acc_norm", 0.25),
    "piqa": ("acc", 0.5), "lambada_openai": ("acc", 0.0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("artifact", type=Path, nargs="+", help="an artifact, or the OUT of a build")
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", help=f"NAME: {', '.join(METRICS)}")
    parser.add_argument("--limit", type=int, default=500, help="documents of each task, 0 for all (default: 500)")
    parser.add_argument("--work", type=Path, default=Path("out/task-table"), help="folder for what was measured")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = dict(given.partition("=")[::2] for given in options.task)
    if wrong := [name for name, file in files.items() if name not in METRICS or not Path(file).is_file()]:
        parser.error(f"--task {wrong[0]}=FILE: a file, and one of {', '.join(METRICS)}")
    source = stages.source_of(options.checkpoint)
    options.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.work / "tasks.jsonl", versions=versions("torch", "transformers", "onnxruntime", "lm_eval"))
    rows = {"original, torch": scores(source, files, options.limit, journal)}
    for folder in options.artifact:
        rows[str(folder)] = scores(Artifact.load(onnx_folder(folder)), files, options.limit, journal)
    table(rows, list(files))


def scores(artifact: Artifact, files: dict[str, str], limit: int, journal: Journal) -> TaskFigures:
    """All tasks' figures of a checkpoint or an artifact, measured once."""

    def measured() -> TaskFigures:
        begun = time.monotonic()
        figures = run(backend(artifact), list(files), list(files.values()), limit)
        print(f"{artifact.path}: {time.monotonic() - begun:.0f} s", flush=True)
        return TaskFigures(figures)

    key = (artifact.identity(), *((name, sha256(Path(file))) for name, file in files.items()), limit)
    return journal.once(TaskFigures, measured, "tasks", *key)


def backend(artifact: Artifact) -> LM:
    """The harness's view of it: an artifact by onnxruntime, a checkpoint by torch in float32."""
    if artifact.format == "onnx":
        return OnnxLM(artifact.path)
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(artifact.path), batch_size=16, dtype="float32", device="cpu")


def table(rows: dict[str, TaskFigures], tasks: list[str]) -> None:
    print("\n| | " + " | ".join(f"{task}, {METRICS[task][0]}" for task in tasks) + " | above chance, share kept |")
    print("| --- |" + " ---: |" * (len(tasks) + 1))
    first = next(iter(rows.values()))
    for name, row in rows.items():
        cells, kept = [], []
        for task in tasks:
            metric, chance = METRICS[task]
            figure, original = row.figures[f"{task}.{metric}"], first.figures[f"{task}.{metric}"]
            cells.append(f"{figure.value:.3f}" + (f" ± {figure.standard_error:.3f}" if figure.standard_error else ""))
            kept.append((figure.value - chance) / (original.value - chance))
        print(f"| {name} | {' | '.join(cells)} | {100 * sum(kept) / len(kept):.0f} % |")


if __name__ == "__main__":
    main()
