"""Quality of an artifact and of every stage behind it, on the same token ids; runs in a measuring process (see worker)."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from edgepress.pipeline.bench.jobs import QualityEvent, QualityFigures, QualityJob, Scored, ScoringRow
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.registry import require
from edgepress.pipeline.runtime.decoder import Decoder

# The original's logits are kept rather than computed again for every row when they take less than this.
KEEP_BYTES = 1 << 30
GREEDY_PROMPTS = 8
GREEDY_PROMPT_TOKENS = 64
GREEDY_TOKENS = 32


def quality(job: QualityJob) -> Iterator[QualityEvent]:
    """Score rows in order: an event for each window as work goes on, and one with the scores of each row.

    With a reference, KL divergence and top-1 agreement are against it.
    """
    ids = [np.array(row, dtype=np.int64) for row in job.windows]
    models = _Models(job.trust_remote_code, job.target)
    original = None if job.reference is None else _Original(models.torch(job.reference), ids)
    for row in job.rows:
        with tempfile.TemporaryDirectory(prefix="edgepress-level-0-") as scratch:
            same = row.kind == "torch" and job.reference is not None and Path(row.folder) == Path(job.reference)
            model = None if same else models.open(row, Path(scratch))
            scores = Quality()
            for number, window in enumerate(ids):
                truth = original(number) if original else None
                logits = model.logits(window) if model else truth
                assert logits is not None
                scores.add(window, logits, truth)
                yield QualityEvent(window=number + 1)
            matches = None
            if row.kind == "onnx" and original is not None and model is not None:
                matches = _greedy_matches(original.model, model, ids) or None
            losses = np.concatenate(scores.losses).astype("<f4")
            figures = QualityFigures(**scores.figures(), greedy_match_tokens=matches)
            yield QualityEvent(scored=Scored(row.key, figures, base64.b64encode(losses.tobytes()).decode()))


def losses_of(scored: Scored) -> np.ndarray:
    """The losses of a scored row by token, float32 (tokens,)."""
    return np.frombuffer(base64.b64decode(scored.losses), dtype="<f4")


class _Model(Protocol):
    """logits: ids (tokens,) to (tokens, vocabulary). greedy: the ``count`` tokens that follow ids."""

    def logits(self, ids: np.ndarray) -> np.ndarray: ...

    def greedy(self, ids: np.ndarray, count: int) -> list[int]: ...


class _Torch:
    """A checkpoint; torch is imported here alone, because the artifact by itself needs none."""

    def __init__(self, folder: str, trust_remote_code: bool) -> None:
        from edgepress.pipeline.checkpoint.load import load_model

        self._model = load_model(Path(folder), trust_remote_code)
        self.vocabulary = int(self._model.config.vocab_size)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        from edgepress.pipeline.metrics.torch_scores import logits_of

        return logits_of(self._model, ids)

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        from edgepress.pipeline.metrics.torch_scores import greedy_tokens

        return greedy_tokens(self._model, ids, count)


class _Onnx:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def logits(self, ids: np.ndarray) -> np.ndarray:
        self.decoder.reset()
        return self.decoder.feed(ids, keep=0)

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        self.decoder.reset()
        return list(self.decoder.greedy(ids, count))


class _Models:
    """Opens the model of a row: a checkpoint in torch, or the shipped files as they are or at float activations."""

    def __init__(self, trust_remote_code: bool, target: str) -> None:
        self._trust, self._target = trust_remote_code, target

    def torch(self, folder: str) -> _Torch:
        return _Torch(folder, self._trust)

    def open(self, row: ScoringRow, scratch: Path) -> _Model:
        if row.kind == "torch":
            return self.torch(row.folder)
        if row.kind == "onnx":
            return _Onnx(Decoder(Path(row.folder), target=self._target))
        require("onnx_ir")
        from edgepress.exporters.proof.recheck import at_level_0

        return _Onnx(at_level_0(Path(row.folder), scratch, self._target))


class _Original:
    """Logits of the original by window, computed once where they fit into KEEP_BYTES."""

    def __init__(self, model: _Torch, windows: list[np.ndarray]) -> None:
        self.model, self._windows = model, windows
        needed = 4 * sum(len(row) for row in windows) * model.vocabulary
        self._kept: dict[int, np.ndarray] | None = {} if needed <= KEEP_BYTES else None

    def __call__(self, number: int) -> np.ndarray:
        if self._kept is None:
            return self.model.logits(self._windows[number])
        if number not in self._kept:
            self._kept[number] = self.model.logits(self._windows[number])
        return self._kept[number]


def _greedy_matches(original: _Torch, model: _Model, windows: list[np.ndarray]) -> tuple[int, ...]:
    """Greedy tokens in common before the first that differs, for the beginning of each of the first windows."""
    room = max(2, min(GREEDY_PROMPT_TOKENS, max(len(row) for row in windows) - GREEDY_TOKENS))
    matches = []
    for prompt in [row[:room] for row in windows if len(row) >= room][:GREEDY_PROMPTS]:
        pairs = zip(original.greedy(prompt, GREEDY_TOKENS), model.greedy(prompt, GREEDY_TOKENS), strict=True)
        matches.append(next((i for i, (a, b) in enumerate(pairs) if a != b), GREEDY_TOKENS))
    return tuple(matches)
