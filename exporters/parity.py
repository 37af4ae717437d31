"""Proof that the ONNX file computes what the torch model computes, over real text and through the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.departure import first_departure
from edgepress.exporters.graph import variant
from edgepress.exporters.matmul_nbits import DOMAIN
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.losses import logits_of
from edgepress.pipeline.perplexity import Quality
from edgepress.pipeline.runtime import Decoder
from edgepress.pipeline.tokens import context_length, text_windows
from transformers import PreTrainedModel

# Largest difference of a logit allowed at float activations, as a share of the standard deviation of the logits.
TOLERANCE = 1e-3
TOKENS = 512
# The same in half precision, and the share of most likely tokens that must stay; rounding alone moves logits by up to 0.03 of their
# spread in the random models of tests/families.py.
TOLERANCE_HALF, AGREEMENT_HALF = 5e-2, 0.98
GREEDY_TOKENS = 32


@dataclass(frozen=True)
class Parity:
    """Outcome at one accuracy level: differences are shares of the standard deviation of torch's logits."""

    accuracy_level: int
    tokens: int
    difference_whole: float
    difference_chunks: float
    difference_steps: float
    difference_batch: float
    top1_agreement: float
    kl_mean: float
    greedy_match_tokens: int

    @property
    def difference(self) -> float:
        """The largest of the four."""
        return max(self.difference_whole, self.difference_chunks, self.difference_steps, self.difference_batch)


def proof_windows(text: Path, folder: Path) -> list[np.ndarray]:
    """What the proof reads of a text with the tokenizer in ``folder``: TOKENS ids or a few more, each window within the context."""
    length = min(context_length(folder) - GREEDY_TOKENS, TOKENS)
    return text_windows(text, folder, budget=TOKENS + length, length=length)


def prove(model: PreTrainedModel, folder: Path, graph: ir.Model, windows: list[np.ndarray]) -> Parity:
    """Compare at float activations; ``graph`` is what ``folder/model.onnx`` was saved from (int8 activations: see levels).

    Windows together hold at least TOKENS ids where the text is long enough. Each is read whole, in chunks, and token by token,
    and two of unequal length in one padded batch. Raises ProofError, which names the first layer that departs, when a logit at
    float activations departs by more than TOLERANCE, or greedy tokens differ (in half precision: by more than TOLERANCE_HALF,
    or the most likely token at more than 1 - AGREEMENT_HALF of the positions).
    """
    decoder = _float_activations(folder, graph)
    half, limit = decoder.dtype == np.float16, tolerance(decoder)
    exact = measure(model, decoder, windows, 0)
    same = exact.top1_agreement >= AGREEMENT_HALF if half else exact.greedy_match_tokens == GREEDY_TOKENS
    if not exact.difference <= limit or not same:
        where = _where(model, folder, windows, exact, limit)
        raise ProofError(
            f"the ONNX model departs from the checkpoint: {where}; logits differ by {exact.difference:.2g} of their spread "
            f"(allowed {limit:g}), {exact.greedy_match_tokens} of {GREEDY_TOKENS} greedy tokens agree; nothing was written; "
            + ("the model may need more than float16: use --target cpu" if half else "try the other --exporter")
        )
    return exact


def tolerance(decoder: Decoder) -> float:
    """What ``Parity.difference`` may be at float activations."""
    return TOLERANCE_HALF if decoder.dtype == np.float16 else TOLERANCE


def _where(model: PreTrainedModel, folder: Path, windows: list[np.ndarray], found: Parity, limit: float) -> str:
    """In which reading and in which layer, in words."""
    if not found.difference_whole <= limit:
        return first_departure(model, folder, [[ids] for ids in windows], limit)
    if not max(found.difference_chunks, found.difference_steps) <= limit:
        return "through the cache only, where " + first_departure(model, folder, [_chunks(ids) for ids in windows], limit)
    return "in a padded batch only" if not found.difference_batch <= limit else "in the most likely tokens"


def measure(model: PreTrainedModel, decoder: Decoder, windows: list[np.ndarray], level: int) -> Parity:
    """Logits of both over the windows, and greedy tokens after the first half of the first window."""
    quality, whole, chunks, steps, spread = Quality(), 0.0, 0.0, 0.0, []
    for ids in windows:
        wanted = logits_of(model, ids)
        spread.append(wanted.std())
        decoder.reset()
        found = decoder.feed(ids, keep=0)
        whole = max(whole, _difference(found, wanted))
        quality.add(ids, found, wanted)
        chunks = max(chunks, _difference(_pieces(decoder, _chunks(ids)), wanted))
        few = ids[:64]
        steps = max(steps, _difference(_pieces(decoder, np.split(few, len(few))), wanted[: len(few)]))
    scale = float(np.mean(spread))
    figures = quality.figures()
    return Parity(
        level,
        sum(map(len, windows)),
        whole / scale,
        chunks / scale,
        steps / scale,
        padded_batch(model, decoder, windows[0]) / scale,
        figures["top1_agreement"],
        figures["kl_mean"],
        _greedy_match(model, decoder, windows[0][: len(windows[0]) // 2]),
    )


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest absolute difference, infinite where only ``found`` is not finite. Raises ProofError where ``wanted`` is not."""
    if not np.isfinite(wanted).all():
        raise ProofError("the logits are not finite (NaN or Inf); the checkpoint is broken, fetch or build it again")
    return float(np.abs(found - wanted).max()) if np.isfinite(found).all() else float("inf")


def _chunks(ids: np.ndarray) -> list[np.ndarray]:
    """A first part, one token, the rest: with and without a past, short and long."""
    return [part for part in np.split(ids, [len(ids) // 3, len(ids) // 3 + 1]) if len(part)]


def padded_batch(model: PreTrainedModel, decoder: Decoder, ids: np.ndarray) -> float:
    """Largest difference of a logit for two prompts of unequal length in one batch, and one more token for each.

    Padding stands on the side that the graph takes; each row must give what it gives alone.
    """
    long = min(len(ids), 64)
    rows = [ids[:long], ids[-(long // 2 + 1) :]]
    batch, mask = np.zeros((2, long - 1), dtype=np.int64), np.zeros((2, long - 1), dtype=np.int64)
    places = [slice(long - len(row), None) if decoder.left_padding else slice(0, len(row) - 1) for row in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        batch[i, place], mask[i, place] = row[:-1], 1
    (first,), cache = decoder.step(batch, mask)
    last = np.array([[row[-1]] for row in rows])
    (second,), _ = decoder.step(last, np.concatenate([mask, np.ones_like(last)], axis=1), cache)
    return max(
        _difference(np.concatenate([first[i, place], second[i]]), logits_of(model, row))
        for i, (row, place) in enumerate(zip(rows, places, strict=True))
    )


def _pieces(decoder: Decoder, pieces: list[np.ndarray]) -> np.ndarray:
    decoder.reset()
    return np.concatenate([decoder.feed(piece, keep=0) for piece in pieces])


def _greedy_match(model: PreTrainedModel, decoder: Decoder, prompt: np.ndarray) -> int:
    """Greedy tokens in common before the first that differs, GREEDY_TOKENS at most.

    torch reads the decoder's own tokens in one forward: up to the first that it would not have chosen, they are its greedy ones.
    """
    decoder.reset()
    found = list(decoder.greedy(prompt, GREEDY_TOKENS))
    ids = np.concatenate([prompt, np.array(found[:-1], dtype=prompt.dtype)])
    wanted = logits_of(model, ids)[len(prompt) - 1 :].argmax(-1)
    return next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), GREEDY_TOKENS)


def _float_activations(folder: Path, graph: ir.Model) -> Decoder:
    """The artifact with accuracy level 0: another graph over the same weights, gone when loaded."""
    levels = [node.attributes["accuracy_level"] for node in graph.graph if node.op_type == "MatMulNBits" and node.domain == DOMAIN]
    if not any(level.as_int() for level in levels):
        return Decoder(folder)
    with variant(folder) as file:
        return Decoder(folder, model=file)
