"""Quality of an artifact and of every stage behind it, on the same token ids; runs in a measuring process (see worker)."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from edgepress.pipeline.bench.jobs import Continuations, QualityEvent, QualityFigures, QualityJob, Scored, ScoringRow
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.machine import large_blocks_given_back, release_memory, rows_at_once
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.registry import require
from edgepress.pipeline.runtime.decoder import Decoder

if TYPE_CHECKING:
    import torch

GREEDY_PROMPTS = 8
GREEDY_PROMPT_TOKENS = 64
GREEDY_TOKENS = 32
ANSWER_TOKENS = 48  # of what was asked
# Positions that a block is read for at a time, for what goes on within one takes memory, too; and how often at most.
STREAMED_TOKENS, PASSES = 4096, 8
_Part = tuple[slice, np.ndarray]  # positions of a window, and their logits float32 (positions, vocabulary)


def quality(job: QualityJob) -> Iterator[QualityEvent]:
    """Score rows in order: an event for each window as work goes on, and one with the scores of each row.

    With a reference, KL divergence and top-1 agreement are against it.
    """
    ids = [np.array(row, dtype=np.int64) for row in job.windows]
    models = _Models(job.trust_remote_code, job.target)
    prompts = _prompts(ids) if job.continued and any(row.kind == "onnx" for row in job.rows) else []
    asked = [np.array(row, dtype=np.int64) for row in job.asked] if prompts else []
    original = None if job.reference is None else _Original(models.torch(job.reference), ids, prompts, asked)
    for row in job.rows:
        with tempfile.TemporaryDirectory(prefix="edgepress-level-0-") as scratch:
            same = row.kind == "torch" and job.reference is not None and Path(row.folder) == Path(job.reference)
            model = None if same else models.open(row, Path(scratch), ids)
            scores = Quality()
            for number, window in enumerate(ids):
                parts = model.parts(window) if model else original.parts(number) if original else iter(())
                for positions, logits in parts:
                    if model is None or original is None:
                        scores.add_part(window[1:][positions], logits, None if original is None else logits)
                        continue
                    for rows, truth in original.parts(number, positions):
                        found = logits[rows.start - positions.start : rows.stop - positions.start]
                        scores.add_part(window[1:][rows], found, truth)
                yield QualityEvent(window=number + 1)
            matches, answers = None, tuple[Continuations, ...]()
            if row.kind == "onnx" and original is not None and prompts and isinstance(model, _Onnx):
                matches = _matches(original.greedy, [model.greedy(prompt, GREEDY_TOKENS) for prompt in prompts]) or None
                own = [model.greedy(prompt, ANSWER_TOKENS) for prompt in asked]
                answers = tuple(map(_answers, job.asked, original.answers, own))
            losses = np.concatenate(scores.losses).astype("<f4")
            figures = QualityFigures(**scores.figures(), greedy_match_tokens=matches)
            yield QualityEvent(scored=Scored(row.key, figures, base64.b64encode(losses.tobytes()).decode(), answers))
        del model
        release_memory()


def losses_of(scored: Scored) -> np.ndarray:
    """The losses of a scored row by token, float32 (tokens,)."""
    return np.frombuffer(base64.b64decode(scored.losses), dtype="<f4")


class _Model(Protocol):
    """parts: the logits of ids (tokens,), some positions after others."""

    def parts(self, ids: np.ndarray) -> Iterator[_Part]: ...


class _Torch:
    """A checkpoint; torch is imported here alone, because the artifact by itself needs none."""

    def __init__(self, folder: str, trust_remote_code: bool) -> None:
        from edgepress.pipeline.checkpoint.load import load_model
        from edgepress.pipeline.metrics.torch_scores import Logits

        self._model = load_model(Path(folder), trust_remote_code)
        self.scoring = Logits(self._model)

    def parts(self, ids: np.ndarray) -> Iterator[_Part]:
        (recorded,) = self.scoring.recorded([ids])
        return self.scoring.parts(recorded)

    def greedy(self, prompts: list[np.ndarray], count: int) -> list[list[int]]:
        """Continuations of prompts of one length."""
        from edgepress.pipeline.metrics.torch_scores import greedy_rows

        return greedy_rows(self._model, np.stack(prompts), count) if prompts else []

    def chances(self, ids: np.ndarray, count: int) -> list[dict[int, float]]:
        from edgepress.pipeline.metrics.torch_scores import greedy_chances

        return greedy_chances(self._model, ids, count)


class _Streamed:
    """A checkpoint whose blocks are in memory one after the other, once for some windows: the original's head is there as well.

    Raises ModelError for one whose tensors are not named as its modules are, or whose blocks cannot be told, and for a long text.
    """

    def __init__(self, folder: str, trust_remote_code: bool, windows: list[np.ndarray]) -> None:
        from edgepress.pipeline.checkpoint.blocks import Blocks
        from edgepress.pipeline.checkpoint.folder import Checkpoint
        from edgepress.pipeline.checkpoint.offloaded import settle
        from edgepress.pipeline.metrics.torch_scores import batches

        checkpoint = Checkpoint(Path(folder), trust_remote_code)
        model = checkpoint.offloaded_model()
        passes = batches(model, windows, STREAMED_TOKENS)
        if len(passes) > PASSES:
            raise ModelError("too much text to read all blocks again and again")
        rows: list[torch.Tensor] = []
        with large_blocks_given_back():
            self._blocks = Blocks(model)  # reads them all, to see what they return
            last = len(self._blocks)
            for ids, real in passes:
                rows += [states[keep] for states, keep in zip(self._blocks.states(ids, [last])[last], real, strict=True)]
        settle(model, checkpoint.weights, without=self._blocks.name)
        self._states = {window.tobytes(): states for window, states in zip(windows, rows, strict=True)}

    def parts(self, ids: np.ndarray) -> Iterator[_Part]:
        for positions, logits in self._blocks.heads(self._states[ids.tobytes()]):
            yield positions, logits.numpy()
            del logits


class _Onnx:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def parts(self, ids: np.ndarray) -> Iterator[_Part]:
        """A window whose logits would take too much memory is read in pieces through the cache."""
        self.decoder.reset()
        rows = rows_at_once(self.decoder.vocabulary)
        for first in range(0, len(ids), rows):
            yield slice(first, min(first + rows, len(ids))), self.decoder.feed(ids[first : first + rows], keep=0)

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        self.decoder.reset()
        return list(self.decoder.greedy(ids, count))


class _Models:
    """Opens the model of a row: a checkpoint in torch, or the shipped files as they are or at float activations."""

    def __init__(self, trust_remote_code: bool, target: str) -> None:
        self._trust, self._target = trust_remote_code, target

    def torch(self, folder: str) -> _Torch:
        return _Torch(folder, self._trust)

    def open(self, row: ScoringRow, scratch: Path, windows: list[np.ndarray]) -> _Model:
        if row.kind == "torch":
            with suppress(ModelError, NotImplementedError):  # the latter: a module reads the weights of another
                return _Streamed(row.folder, self._trust, windows)
            return self.torch(row.folder)
        if row.kind == "onnx":
            return _Onnx(Decoder(Path(row.folder), target=self._target))
        require("onnx_ir")
        from edgepress.exporters.proof.recheck import at_level_0

        return _Onnx(at_level_0(Path(row.folder), scratch, self._target))


class _Original:
    """The original's logits by window, made as often as asked for from what left its last block; its blocks are freed.

    greedy: its continuations of the prompts; answers: of what was asked, with the probabilities of likely tokens.
    """

    def __init__(self, model: _Torch, windows: list[np.ndarray], prompts: list[np.ndarray], asked: list[np.ndarray]) -> None:
        self.greedy = model.greedy(prompts, GREEDY_TOKENS)
        self.answers = [model.chances(prompt, ANSWER_TOKENS) for prompt in asked]
        self._scoring = model.scoring
        self._recorded = list(self._scoring.recorded(windows))
        self._scoring.drop_blocks()
        release_memory()

    def parts(self, number: int, positions: slice = slice(0, None)) -> Iterator[_Part]:
        return self._scoring.parts(self._recorded[number], positions.start, positions.stop)


def _answers(asked: tuple[int, ...], chances: list[dict[int, float]], artifact: list[int]) -> Continuations:
    """What both answer, and how likely the original held the two tokens at which they part; 0 for less than 1 %."""
    original = [next(iter(known)) for known in chances]
    place = in_common(original, artifact)
    held = None if place == len(original) else (chances[place][original[place]], chances[place].get(artifact[place], 0.0))
    return Continuations(asked, tuple(original), tuple(artifact), held)


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens of two continuations before the first that differs."""
    return next((place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))


def _prompts(windows: list[np.ndarray]) -> list[np.ndarray]:
    room = max(2, min(GREEDY_PROMPT_TOKENS, max(len(row) for row in windows) - GREEDY_TOKENS))
    return [row[:room] for row in windows if len(row) >= room][:GREEDY_PROMPTS]


def _matches(original: list[list[int]], model: list[list[int]]) -> tuple[int, ...]:
    """Greedy tokens in common before the first that differs, by prompt."""
    return tuple(map(in_common, original, model))
