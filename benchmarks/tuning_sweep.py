"""How the settings of tune were chosen: one quantized model, tuned again and again from the same state, judged on other texts.

    python benchmarks/tuning_sweep.py ORIGINAL QUANTIZED SCRATCH --calibration TEXT --text TEXT --text TEXT
        --variant "" --variant rate=6e-3 --variant window=256,batch=1024 --variant texts=self+TEXT [--tokens 24576]

Prints Markdown: KL divergence of every text (nats a token, float32, over the original's 128 likeliest tokens and the rest), and the
seconds of processor time of the training alone (on a GPU: of the clock); the original's predictions are computed once and kept in
SCRATCH. A variant is a list of name=value in which the defaults are those of tune:

    rate            as --tune-rate
    norms           factor on the rate of norms and biases
    window, batch   tokens
    beta2           of AdamW
    parts           train only what has this in its name
    texts           learn from equal shares of these, joined by +, in place of --calibration; self is the model's own
    tokens, fit     in place of --tokens and --fit-tokens
    codes           let integers move, too: rounding anew at every step with straight-through gradients (as AutoRound, Cheng et al.
                    2023), from the original's weights; the factor on their rate
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.files import sha256
from edgepress.pipeline.options import PRUNE_TOKENS, SELF
from edgepress.pipeline.own_text.kept import own_text
from edgepress.pipeline.text.calibration import even_windows
from edgepress.pipeline.text.windows import text_windows
from edgepress.pipeline.tune.stage import RATE, WINDOW
from edgepress.pipeline.tune.student import Dequantized, Student
from edgepress.pipeline.tune.teacher import mean_divergence, record
from edgepress.pipeline.tune.train import BATCH_TOKENS, BETAS, Lesson, Settings, train


@dataclass(frozen=True)
class Variant:
    """What one row of the table differs in."""

    rate: float = RATE
    norms: float = 1.0
    window: int = WINDOW
    batch: int = BATCH_TOKENS
    beta2: float = BETAS[1]
    parts: str = ""
    texts: str = ""
    tokens: int = 0
    fit: int = 0
    codes: float = 0.0

    @classmethod
    def parsed(cls, text: str) -> Variant:
        """From name=value,name=value."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        given = dict(part.split("=", 1) for part in text.split(",") if part)
        return cls(**{name: kinds[name](value) for name, value in given.items()})


class Rounded(Dequantized):
    """Integers that learn: what they were rounded from is a parameter, rounded again at every step."""

    latent: torch.nn.Parameter
    lowest: torch.Tensor
    highest: torch.Tensor

    @staticmethod
    def replace(dequantized: Dequantized, packed: PackedLinear, weight: torch.Tensor, scales: torch.Tensor) -> None:
        """Turn a Dequantized into this. weight: the original's (out, in), of a matrix without padding or permutation."""
        dequantized.__class__ = Rounded
        zeros = torch.tensor(1 << packed.bits - 1) if packed.zeros is None else torch.from_numpy(packed.zeros.astype(np.float32))
        zeros = zeros.to(scales)[..., None] if zeros.ndim else zeros.to(scales)
        dequantized.register_buffer("lowest", -zeros)
        dequantized.register_buffer("highest", (1 << packed.bits) - 1 - zeros)
        exact = weight.to(scales).reshape(*scales.shape, -1) / scales[..., None]
        codes = dequantized.values.float()  # what is clipped or was moved by GPTQ begins where its code is
        dequantized.latent = torch.nn.Parameter(codes + (exact - codes).clamp(-0.49, 0.49))

    def forward(self, scales: torch.Tensor) -> torch.Tensor:
        """As its base has it, of what ``latent`` rounds to."""
        latent = torch.maximum(torch.minimum(self.latent, self.highest), self.lowest)
        self.values = latent + (latent.round() - latent).detach()
        return super().forward(scales)


class Sweep:
    """The student and the state that it starts from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        arguments.scratch.mkdir(parents=True, exist_ok=True)
        self.student = Student(Checkpoint(arguments.quantized))
        self._start = {name: p.detach().clone() for name, p in self.student.trained()}
        self._integers = {name: self._dequantized(name).values for name in self.student.matrices}
        self._judged = [self._judging(path) for path in arguments.text]

    def train(self, variant: Variant) -> tuple[float, list[float]]:
        """Train one variant from the start; seconds of processor time, and the divergence of training first and last."""
        fit = self._fit(variant)
        settings = Settings(
            variant.rate, variant.tokens or self.arguments.tokens, 1.0, bfloat16=True, batch_tokens=variant.batch,
            norms=variant.norms, betas=(BETAS[0], variant.beta2), codes=variant.codes,
        )  # fmt: skip
        for name, parameter in self.student.model.named_parameters():
            if name in self._start:
                parameter.data.copy_(self._start[name])
                parameter.requires_grad_(variant.parts in name)
        self._let_integers_move(variant.codes > 0)
        begun = self._clock()
        training = train(self.student, fit, [], settings, self.arguments.scratch / "training.pt")
        seconds = self._clock() - begun
        (self.arguments.scratch / "training.pt").unlink(missing_ok=True)
        return seconds, training.first_and_last()

    def judge(self) -> list[float]:
        """Divergence of every text in the present state."""
        return [mean_divergence(self.student.model, one.windows, one.predictions) for one in self._judged]

    def _clock(self) -> float:
        """Seconds of processor time, of the wall clock on a GPU."""
        return time.process_time() if self.student.model.device.type == "cpu" else time.monotonic()

    def _dequantized(self, name: str) -> Dequantized:
        found: Dequantized = self.student.model.get_submodule(name).parametrizations.weight[0]
        return found

    def _let_integers_move(self, move: bool) -> None:
        original = Checkpoint(self.arguments.original) if move else None
        weights = dict(original.tensors()) if original else {}
        for name, integers in self._integers.items():
            dequantized = self._dequantized(name)
            if isinstance(dequantized, Rounded):
                del dequantized.latent, dequantized.values
                dequantized.__class__ = Dequantized
                dequantized.register_buffer("values", integers)
            if original:
                packed = self.student.packed()[name]
                scales = self.student.model.get_submodule(name).parametrizations.weight.original.detach()
                tensor = weights[f"{name}.weight" if f"{name}.weight" in weights else "model.embed_tokens.weight"]
                Rounded.replace(dequantized, packed, tensor, scales)
                del dequantized.values

    def _judging(self, path: Path) -> Lesson:
        windows = text_windows(path, self.arguments.original, budget=self.arguments.text_tokens, length=512)
        return self._lesson(windows, f"{sha256(path)} {self.arguments.text_tokens}", bfloat16=False)

    def _fit(self, variant: Variant) -> Lesson:
        paths = [Path(text) for text in variant.texts.split("+")] if variant.texts else [self.arguments.calibration]
        files = [own_text(Checkpoint(self.arguments.original), PRUNE_TOKENS) if path == SELF else path for path in paths]
        budget = (variant.fit or self.arguments.fit_tokens) // len(files)
        shares = [even_windows(file, self.arguments.original, budget, longest=variant.window) for file in files]
        key = f"{[sha256(file) for file in files]} {variant.window} {budget}"
        return self._lesson([window for windows in shares for window in windows], key, bfloat16=True)

    def _lesson(self, windows: list[np.ndarray], key: str, bfloat16: bool) -> Lesson:
        stem = self.arguments.scratch / hashlib.sha256(f"{self.arguments.original} {key}".encode()).hexdigest()[:16]
        kept = stem.with_suffix(".logs").is_file()
        device = self.student.model.device
        teacher = self.student.model if kept else Checkpoint(self.arguments.original).model().to(device)  # not asked if kept
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return Lesson(windows, record(teacher, windows, stem))


def row(label: str, seconds: str, training: list[float], judged: list[float]) -> None:
    """One line of the table."""
    shown = " to ".join(f"{value:.4f}" for value in training)
    cells = [label, seconds, shown, *(f"{value:.4f}" for value in [*judged, float(np.mean(judged))])]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, action="append")
    parser.add_argument("--text-tokens", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--fit-tokens", type=int, default=16384, help="of the text, read again and again")
    parser.add_argument("--variant", action="append", default=[])
    arguments = parser.parse_args()
    sweep = Sweep(arguments)
    columns = "".join(f" {text.stem} |" for text in arguments.text)
    print(f"| {arguments.quantized.name} | seconds | training KL |{columns} mean |")
    print("| --- | ---: | ---: |" + " ---: |" * (len(arguments.text) + 1))
    row("not tuned", "", [], sweep.judge())
    for text in arguments.variant:
        seconds, training = sweep.train(Variant.parsed(text))
        row(text or "default", f"{seconds:.0f}", training, sweep.judge())


if __name__ == "__main__":
    main()
