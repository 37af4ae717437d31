"""The training loop: AdamW on scales, norms and biases, half a cosine of learning rate, and a checkpoint to resume from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.progress import bar
from edgepress.pipeline.tune.student import Student
from edgepress.pipeline.tune.teacher import Predictions, divergence, mean_divergence, small_batches
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
BATCH_TOKENS = 256
BETAS = (0.9, 0.99)  # of AdamW
WARM_UP = 0.05  # of the steps
LOOKS = 8  # times that held-out text is looked at, and the best state kept
SAVE_SECONDS = 30.0
PASSES = 10  # over the text at most: more of them teach a small model the text by heart
FEW = 20  # steps: fewer change next to nothing


@dataclass(frozen=True)
class Lesson:
    """Windows of token ids, and the original's predictions at their positions."""

    windows: list[np.ndarray]
    predictions: Predictions


@dataclass(frozen=True)
class Settings:
    """learning_rate: of every parameter, as a share of its mean size. tokens: to train on, None for as many as ``minutes`` allow.

    batch_tokens: positions a step. betas: of AdamW. norms: factor on the learning rate of what is no scale.
    codes: the same of integers that learn (benchmarks/tuning_sweep.py; a Student of this stage has none).

    bfloat16: whether matrices are multiplied in it; parameters and their changes are float32 in any case.
    """

    learning_rate: float
    tokens: int | None
    minutes: float
    bfloat16: bool
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS
    betas: tuple[float, float] = BETAS
    norms: float = 1.0
    codes: float = 0.0


@dataclass
class Training:
    """What a run has come to. held_out: mean divergence of the held-out lessons at each look; kept: the parameters of the best."""

    steps: int
    batch_tokens: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def first_and_last(self) -> list[float]:
        """Mean training divergence of the first and of the last tenth of the steps."""
        edge = max(1, len(self.losses) // 10)
        return [round(float(np.mean(part)), 6) for part in (self.losses[:edge], self.losses[-edge:])]


def train(student: Student, lesson: Lesson, held_out: list[Lesson], settings: Settings, file: Path) -> Training:
    """Train the student in place and leave it in its best state; ``file``: the checkpoint, resumed from if it is there.

    With ``settings.tokens`` and on one thread the same call gives the same parameters, interrupted or not.
    """
    with _attending_by_matrices(student.model, settings.bfloat16):
        return _train(student, lesson, held_out, settings, file)


@contextmanager
def _attending_by_matrices(model: PreTrainedModel, bfloat16: bool) -> Iterator[None]:
    """On windows this short torch's fused attention is slower in bfloat16, there and back, than the matrices written out."""
    former = model.config._attn_implementation
    if bfloat16 and former != "eager":
        with suppress(ValueError):  # a class of its own that knows one implementation
            model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if model.config._attn_implementation != former:
            model.set_attn_implementation(former)


def _train(student: Student, lesson: Lesson, held_out: list[Lesson], settings: Settings, file: Path) -> Training:
    run = _Run(student, lesson, held_out, settings)
    training = run.resumed(file) or Training(run.steps(), run.batch_tokens)
    if training.step:
        log.info("tune: resuming at step %d of %d", training.step, training.steps)
    else:
        run.look(training)
    saved = time.monotonic()
    with bar("tune", training.steps, "step") as shown:
        shown.update(training.step)
        while training.step < training.steps:
            training.losses.append(run.train_step(training.step, _rate(training.step, training.steps)))
            training.step += 1
            shown.update()
            if training.step * LOOKS // training.steps > (training.step - 1) * LOOKS // training.steps:
                run.look(training)
            if time.monotonic() - saved > SAVE_SECONDS:
                run.save(training, file)
                saved = time.monotonic()
    with torch.no_grad():
        for name, value in training.kept.items():
            run.parameters[name].copy_(value)
    return training


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then half a cosine to a hundredth."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Run:
    """The parts of one training."""

    def __init__(self, student: Student, lesson: Lesson, held_out: list[Lesson], settings: Settings) -> None:
        self._model, self._lesson, self._held_out, self._settings = student.model, lesson, held_out, settings
        self.parameters = dict(student.trained())
        sizes = {name: float(p.detach().abs().mean()) or 1.0 for name, p in self.parameters.items()}
        kinds = {".latent": settings.codes, ".original": 1.0}
        factors = {name: kinds.get(name[name.rfind(".") :], settings.norms) for name in self.parameters}
        self._rates = [settings.learning_rate * factors[name] * sizes[name] for name in self.parameters]
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters.values(), self._rates, strict=True)]
        self._optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=0.0)
        self._starts = np.cumsum([0, *map(len, lesson.windows)])
        self._batch = max(1, settings.batch_tokens // len(lesson.windows[0]))
        self.batch_tokens = self._batch * len(lesson.windows[0])

    def steps(self) -> int:
        """Steps for the tokens asked for, or for the minutes, by timing one step and one look."""
        if self._settings.tokens is not None:
            return max(1, math.ceil(self._settings.tokens / self.batch_tokens))
        seconds = []
        for action in (lambda: self._accumulate(0), lambda: self._accumulate(0), self._held_out_divergence):
            begun = time.monotonic()
            action()
            seconds.append(time.monotonic() - begun)
        self._optimizer.zero_grad()
        steps = max(1, int((60 * self._settings.minutes - (LOOKS + 1) * seconds[2]) / seconds[1]))
        enough = math.ceil(PASSES * len(self._lesson.windows) / self._batch)
        if enough < FEW:
            log.warning("warning: the text is enough for %d steps of training; give a longer --calibration text", enough)
        elif steps < FEW:
            log.warning(
                "warning: only %d steps of training fit into %g minutes; give more --minutes", steps, self._settings.minutes
            )
        return min(steps, enough)

    def train_step(self, step: int, rate: float) -> float:
        """One change of the parameters; returns the mean divergence before it, in nats a token."""
        loss = self._accumulate(step)
        for group, peak in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = peak * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def look(self, training: Training) -> None:
        """Score the held-out lessons, and keep the parameters if they are the best so far; without lessons the last are kept."""
        if not self._held_out:
            return
        score = self._held_out_divergence()
        if score < min(training.held_out, default=math.inf):
            training.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        training.held_out.append(score)

    def save(self, training: Training, file: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        present = {name: p.detach() for name, p in self.parameters.items()}
        part = file.with_suffix(".part")
        torch.save({"training": vars(training), "present": present, "optimizer": self._optimizer.state_dict()}, part)
        part.replace(file)

    def resumed(self, file: Path) -> Training | None:
        """What ``save`` wrote, with parameters and optimizer as they were; None where there is nothing whole."""
        with suppress(OSError, RuntimeError, EOFError, KeyError, ValueError):
            saved = torch.load(file, weights_only=True, map_location=self._model.device)
            training = Training(**saved["training"])
            self._optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(saved["present"][name])
            return training
        return None

    def _held_out_divergence(self) -> float:
        with self._precision():
            return float(np.mean([mean_divergence(self._model, one.windows, one.predictions) for one in self._held_out]))

    def _accumulate(self, step: int) -> float:
        """Gradients of the mean divergence over one batch; returns it. Batches are small enough for their logits to fit."""
        chosen = self._chosen(step)
        windows = [self._lesson.windows[index] for index in chosen]
        positions = np.concatenate([np.arange(self._starts[index], self._starts[index + 1]) for index in chosen])
        predictions, total, row = self._lesson.predictions, 0.0, 0
        for ids, real in small_batches(self._model, windows):
            rows = positions[row : row + int(real.sum())]
            row += len(rows)
            with self._precision():
                logits = self._model(input_ids=ids, use_cache=False).logits[real]
            loss = divergence(logits, *predictions.at(rows, logits.device)).sum() / len(positions)
            loss.backward()
            total += float(loss.detach())
        return total

    def _chosen(self, step: int) -> list[int]:
        """Indices of a step's windows: the text again and again, each time in another order."""
        count = len(self._lesson.windows)
        first = step * self._batch
        return [int(self._order(at // count)[at % count]) for at in range(first, first + self._batch)]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._lesson.windows))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=self._settings.bfloat16)
