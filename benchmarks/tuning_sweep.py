"""How the settings of tune were chosen: one quantized model, tuned again and again from the same state, judged on other texts.

    python benchmarks/tuning_sweep.py ORIGINAL QUANTIZED SCRATCH --calibration TEXT --text TEXT --text TEXT
        --variant "" --variant rate=6e-3 --variant window=128,batch=512,parts=norm [--tokens 24576] [--fit-tokens 16384]

Prints Markdown: KL divergence (nats a token, in float32) of every text, and the seconds of processor time that the training took, without
the original's predictions, which are computed once a window length and kept in SCRATCH. A variant is a list of name=value: rate, norms
(factor on the rate of norms and biases), window, batch (tokens), beta1, beta2, parts (train what has it in its name), text (a second
calibration text joined), tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.files import sha256
from edgepress.pipeline.options import PRUNE_TOKENS, SELF, TuneOptions
from edgepress.pipeline.own_text.kept import own_text
from edgepress.pipeline.text.calibration import even_windows
from edgepress.pipeline.text.windows import text_windows
from edgepress.pipeline.tune.stage import WINDOW
from edgepress.pipeline.tune.student import Student
from edgepress.pipeline.tune.teacher import mean_divergence, record
from edgepress.pipeline.tune.train import BATCH_TOKENS, Lesson, Settings, train
from transformers import PreTrainedModel


class Sweep:
    """The student and what it starts from; the original is loaded only where its predictions are not kept yet."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self._teacher = arguments, None
        self.student = Student(Checkpoint(arguments.quantized))
        self._start = {name: p.detach().clone() for name, p in self.student.trained()}
        self.judged = [self._judging(path) for path in arguments.text]
        self._release()

    def row(self, variant: str) -> str:
        """Train one variant and give its cells."""
        chosen = dict(part.split("=") for part in variant.split(",") if part)
        window = int(chosen.get("window", WINDOW))
        texts = [self.arguments.calibration, *map(Path, chosen["text"].split("+") if "text" in chosen else [])]
        if "only" in chosen:
            texts = [Path(path) for path in chosen["only"].split("+")]
        fit = self._fit(texts, window, int(chosen.get("fit", self.arguments.fit_tokens)))
        moves = float(chosen.get("moves", 0))
        settings = Settings(
            float(chosen.get("rate", TuneOptions.tune_rate)), int(chosen.get("tokens", self.arguments.tokens)), 1.0, True,
            batch_tokens=int(chosen.get("batch", BATCH_TOKENS)), norms=float(chosen.get("norms", 1)), moves=moves,
            betas=(float(chosen.get("beta1", 0.9)), float(chosen.get("beta2", 0.99))),
        )  # fmt: skip
        for name, parameter in self.student.model.named_parameters():
            if name in self._start:
                parameter.data.copy_(self._start[name])
                parameter.requires_grad_(chosen.get("parts", "") in name)
        for one in self.student.seen:
            one.offsets = None
        self.student.seen.clear()
        if moves:
            self.student.let_codes_move(self._original(Path("none")))
        self._release()
        begun = time.process_time()
        training = train(self.student, fit, [], settings, self.arguments.scratch / "training.pt")
        seconds = time.process_time() - begun
        (self.arguments.scratch / "training.pt").unlink(missing_ok=True)
        return self._cells(variant or "default", f"{seconds:.0f}", [*training.first_and_last()])

    def untuned(self) -> str:
        return self._cells("not tuned", "", [])

    def _cells(self, name: str, seconds: str, training: list[float]) -> str:
        kl = [mean_divergence(self.student.model, one.windows, one.predictions) for one in self.judged]
        shown = " -> ".join(f"{value:.4f}" for value in training)
        return "| " + " | ".join([name, seconds, shown, *(f"{value:.4f}" for value in kl), f"{np.mean(kl):.4f}"]) + " |"

    def _judging(self, path: Path) -> Lesson:
        windows = text_windows(path, self.arguments.original, budget=self.arguments.text_tokens, length=512)
        return self._lesson(windows, f"{sha256(path)} {self.arguments.text_tokens}", False)

    def _fit(self, texts: list[Path], window: int, tokens: int) -> Lesson:
        windows = []
        for path in texts:
            if path == SELF:
                path = own_text(Checkpoint(self.arguments.original), PRUNE_TOKENS)
            windows += even_windows(path, self.arguments.original, tokens // len(texts), longest=window)
        return self._lesson(windows, f"{texts} {window} {tokens}", True)

    def _lesson(self, windows: list[np.ndarray], key: str, bfloat16: bool) -> Lesson:
        stem = self.arguments.scratch / hashlib.sha256(f"{self.arguments.original} {key}".encode()).hexdigest()[:16]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            return Lesson(windows, record(self._original(stem), windows, stem))

    def _original(self, stem: Path) -> PreTrainedModel | None:
        if self._teacher is None and not stem.with_suffix(".logs").is_file():
            self._teacher = Checkpoint(self.arguments.original).model()
        return self._teacher or self.student.model

    def _release(self) -> None:
        self._teacher = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, action="append")
    parser.add_argument("--text-tokens", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--fit-tokens", type=int, default=16384)
    parser.add_argument("--variant", action="append", default=[])
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(arguments)
    columns = "".join(f" {text.stem} |" for text in arguments.text)
    print(f"| {arguments.quantized.name} | CPU seconds | training KL |{columns} mean |")
    print("| --- | ---: | ---: |" + " ---: |" * (len(arguments.text) + 1))
    print(sweep.untuned(), flush=True)
    for variant in arguments.variant:
        print(sweep.row(variant), flush=True)


if __name__ == "__main__":
    main()
