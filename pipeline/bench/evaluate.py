"""Quality of an artifact and of every stage behind it, on the same token ids; runs in a measuring process (see worker)."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.registry import load
from edgepress.pipeline.runtime.decoder import Decoder

# The original's logits are kept rather than computed again for every row when they take less than this.
KEEP_BYTES = 1 << 30
GREEDY_PROMPTS = 8
GREEDY_PROMPT_TOKENS = 64
GREEDY_TOKENS = 32
Logits = Callable[[np.ndarray], np.ndarray]


def quality(
    windows: list[list[int]], reference: str | None, rows: list[dict[str, Any]], trust_remote_code: bool, target: str
) -> Iterator[dict[str, Any]]:
    """Score rows in order. A row is {"key", "kind": "torch" | "onnx" | "onnx_level_0", "folder"}.

    Answers {"window": n} as work goes on and {"key", "figures", "losses"} for each row; losses are those of every scored
    token in nats, float32 (tokens,), in base64. With a reference, KL divergence and top-1 agreement are against it.
    """
    ids = [np.array(row, dtype=np.int64) for row in windows]
    models = _Models(trust_remote_code, target)
    original = None if reference is None else _Original(models.torch(reference), ids)
    for row in rows:
        with tempfile.TemporaryDirectory(prefix="edgepress-level-0-") as scratch:
            same = original is not None and row["kind"] == "torch" and Path(row["folder"]) == Path(str(reference))
            model = None if same else models.open(row, Path(scratch))
            found = Quality()
            for number, window in enumerate(ids):
                wanted = original(number) if original else None
                scores = model.logits(window) if model else wanted
                assert scores is not None
                found.add(window, scores, wanted)
                yield {"window": number + 1}
            figures = {**found.figures()}
            if row["kind"] == "onnx" and original is not None and model is not None:
                figures["greedy_match_tokens"] = _greedy_matches(original.model, model, ids)
            losses = np.concatenate(found.losses).astype("<f4")
            yield {"key": row["key"], "figures": figures, "losses": base64.b64encode(losses.tobytes()).decode()}


def losses_of(row: dict[str, Any]) -> np.ndarray:
    """The per-token losses in an answer of ``quality``, float32 (tokens,)."""
    return np.frombuffer(base64.b64decode(row["losses"]), dtype="<f4")


class _Torch:
    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, ids: np.ndarray) -> np.ndarray:
        found: np.ndarray = load("edgepress.pipeline.metrics.torch_scores:logits_of")(self.model, ids)
        return found

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        tokens: list[int] = load("edgepress.pipeline.metrics.torch_scores:greedy_tokens")(self.model, ids, count)
        return tokens


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
        load_model = load("edgepress.pipeline.checkpoint.load:load_model")  # the artifact alone needs no torch
        return _Torch(load_model(Path(folder), self._trust))

    def open(self, row: dict[str, Any], scratch: Path) -> _Torch | _Onnx:
        if row["kind"] == "torch":
            return self.torch(row["folder"])
        folder = Path(row["folder"])
        if row["kind"] == "onnx":
            return _Onnx(Decoder(folder, target=self._target))
        return _Onnx(load("edgepress.exporters.proof.recheck:at_level_0")(folder, scratch, self._target))


class _Original:
    """Logits of the original by window, computed once where they fit into KEEP_BYTES."""

    def __init__(self, model: _Torch, windows: list[np.ndarray]) -> None:
        self.model, self._windows = model, windows
        needed = 4 * sum(len(row) for row in windows) * model.model.config.vocab_size
        self._kept: dict[int, np.ndarray] | None = {} if needed <= KEEP_BYTES else None

    def __call__(self, number: int) -> np.ndarray:
        if self._kept is None:
            return self.model.logits(self._windows[number])
        if number not in self._kept:
            self._kept[number] = self.model.logits(self._windows[number])
        return self._kept[number]


def _greedy_matches(original: _Torch, model: _Torch | _Onnx, windows: list[np.ndarray]) -> list[int]:
    """Greedy tokens in common before the first that differs, for the beginning of each of the first windows."""
    room = max(2, min(GREEDY_PROMPT_TOKENS, max(len(row) for row in windows) - GREEDY_TOKENS))
    matches = []
    for prompt in [row[:room] for row in windows if len(row) >= room][:GREEDY_PROMPTS]:
        pairs = zip(original.greedy(prompt, GREEDY_TOKENS), model.greedy(prompt, GREEDY_TOKENS), strict=True)
        matches.append(next((i for i, (a, b) in enumerate(pairs) if a != b), GREEDY_TOKENS))
    return matches
