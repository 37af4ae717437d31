"""What tuning wins back at equal bytes, and how its settings were chosen: KL and perplexity on texts that taught nothing.

    python benchmarks/tuning.py ORIGINAL SCRATCH_FOLDER --text wiki.test.raw --text stories.txt [--calibration TEXT]
        [--method gptq] [--bits 4] [--group-size 64] [--tokens 65536] [--variants default,rate/3,scales]

Prints Markdown. Every row is a checkpoint that the command line's own stages wrote; finished folders are kept, so an interrupted
run resumes (its seconds are then unknown). Texts are read after --skip tokens: a calibration text may be the beginning of one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import QuantizeOptions, TuneOptions
from edgepress.pipeline.text.windows import text_windows
from edgepress.pipeline.tune import stage, student, train
from transformers import PreTrainedModel

RATE = stage.RATE
# Name -> options that differ from the defaults, and constants of modules that do.
VARIANTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "default": ({}, {}),
    "rate/3": ({"tune_rate": RATE / 3}, {}),
    "rate*3": ({"tune_rate": RATE * 3}, {}),
    "scales alone": ({}, {"parts": ".original"}),
    "norms alone": ({}, {"parts": "norm"}),
    "windows of 256": ({}, {"window": 256}),
    "windows of 512": ({}, {"window": 512}),
    "batches of 512": ({}, {"batch": 512}),
    "batches of 1024": ({}, {"batch": 1024}),
    "float32": ({}, {"noise": 0.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", type=Path, required=True, action="append")
    parser.add_argument("--text-tokens", type=int, default=4096)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--calibration", type=Path, default=TuneOptions.calibration)
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--variants", default="default", help=f"of: {', '.join(VARIANTS)}")
    options = parser.parse_args()
    texts = [text_windows(text, options.original, budget=options.text_tokens, skip=options.skip) for text in options.text]
    settings = QuantizeOptions(
        method=options.method, bits=options.bits, group_size=options.group_size, head_bits=options.head_bits,
    )  # fmt: skip
    name = f"{options.method}-{options.bits}-{options.group_size}-{options.head_bits}"
    quantized = stages.run("quantize", Artifact.load(options.original), options.scratch / name, settings)
    original = Checkpoint(options.original).model()
    columns = "".join(f" {text.stem}: KL | perplexity |" for text in options.text)
    print(f"| {name} | seconds | held-out KL |{columns}\n| --- | ---: | ---: |" + " ---: | ---: |" * len(texts))
    row("not tuned", "", "", original, quantized, texts)
    for variant in options.variants.split(","):
        changes, constants = VARIANTS[variant]
        tuning = TuneOptions(**(
            {"original": options.original, "calibration": options.calibration, "tune_tokens": options.tokens}
            | {"calibration_tokens": options.calibration_tokens} | changes
        ))  # type: ignore[arg-type]  # fmt: skip
        out = options.scratch / f"{name}-{variant.replace('/', 'd').replace('*', 'x').replace(' ', '-')}-{options.tokens}"
        begun, kept = time.monotonic(), out.is_dir()
        with _changed(constants):
            tuned = stages.run("tune", quantized, out, tuning)
        seconds = "" if kept else f"{time.monotonic() - begun:.0f}"
        held_out = tuned.steps[-1].facts["held_out_kl"]
        row(variant, seconds, f"{held_out[0]:.4f} -> {held_out[1]:.4f}", original, tuned, texts)


@contextmanager
def _changed(constants: dict[str, object]) -> Iterator[None]:
    trained = student.Student.trained
    part = str(constants.get("parts", ""))
    with (
        patch.object(stage, "WINDOW", constants.get("window", stage.WINDOW)),
        patch.object(stage, "NOISE", constants.get("noise", stage.NOISE)),
        patch.object(stage, "Settings", partial(train.Settings, batch_tokens=constants.get("batch", train.BATCH_TOKENS))),
        patch.object(student.Student, "trained", lambda self: (pair for pair in trained(self) if part in pair[0])),
    ):
        yield


def row(
    label: str, seconds: str, held_out: str, original: PreTrainedModel, artifact: Artifact, texts: list[list[np.ndarray]]
) -> None:
    """One checkpoint on every text."""
    model, cells = Checkpoint(artifact.path).model(), []
    for windows in texts:
        scores = Quality()
        for ids in windows:
            scores.add(ids, logits_of(model, ids), logits_of(original, ids))
        figures = scores.figures()
        cells += [f"{figures['kl_mean']:.4f}", f"{figures['perplexity']:.2f}"]
    print("| " + " | ".join([label, seconds, held_out, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
