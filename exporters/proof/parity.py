"""Proof that the ONNX file computes what the torch model computes, over real text and through the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.files import variant
from edgepress.exporters.graph.operators import DOMAIN
from edgepress.exporters.graph.web import has_bytes
from edgepress.exporters.proof.mismatch import first_mismatch
from edgepress.exporters.proof.reference import ROWS, ReferenceLogits
from edgepress.exporters.proof.switch import crossings, logits_as_read
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.progress import progress
from edgepress.pipeline.runtime.decoder import MODEL, Decoder
from edgepress.pipeline.text.reading import KEY
from edgepress.pipeline.text.windows import GREEDY_TOKENS, PROOF_TOKENS, proof_window, text_windows

# Largest difference of a logit allowed at float activations, as a share of the standard deviation of the logits.
TOLERANCE = 1e-3
# The same in half precision, and the share of most likely tokens that must agree; rounding alone moves logits by up to 0.03 of
# their standard deviation in the random models of tests/families.py.
TOLERANCE_HALF, AGREEMENT_HALF = 5e-2, 0.98
STEPS = 64  # tokens that are read one by one
# Rounding may swap two tokens whose logits are closer than this share of the standard deviation.
TIE = 1e-4


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
    flipped: int | None  # positions with another most likely token, ties aside; None where activations are not float32
    loss_change: float = 0.0  # nats a token that the artifact loses more than torch, and the standard error
    loss_change_error: float = 0.0
    difference_switch: float = 0.0  # token by token to where the rotary frequencies change, and beyond

    @property
    def difference(self) -> float:
        """The largest of the five."""
        ways = (self.difference_whole, self.difference_chunks, self.difference_steps, self.difference_batch)
        return max(*ways, self.difference_switch)


def proof_windows(text: Path, folder: Path, switches: Sequence[int] = (), key: str = KEY) -> list[np.ndarray]:
    """Windows int64 (tokens,) of a text for the proof, at least PROOF_TOKENS ids in all where the text has as many.

    folder: of the tokenizer and the config. The windows leave room in the context for greedy tokens; a short last one is
    dropped if it is not needed. switches: lengths beyond which rotary frequencies change, which no window exceeds, so that
    its pieces are what the whole is. key: see read_text. Raises ModelError for a context that is too short.
    """
    length = min(proof_window(folder), *switches) if switches else proof_window(folder)
    windows = text_windows(text, folder, budget=PROOF_TOKENS + length, length=length, key=key)
    return windows[:-1] if len(windows[-1]) < min(length, STEPS) and sum(map(len, windows[:-1])) >= PROOF_TOKENS else windows


def prove(reference: ReferenceLogits, folder: Path, graph: ir.Model, other_way: str = "choose another model") -> Parity:
    """Compare at float activations; ``graph`` is what ``folder/model.onnx`` was saved from (int8 activations: see accuracy_level).

    Each window is read whole and in chunks, STEPS tokens in all one by one, and two rows of unequal length in one padded
    batch; and a text that goes on where the rotary frequencies change, if they do. Raises ProofError, which names the first
    layer that differs, when there are ``faults``. other_way: what may help then, in float32.
    """
    with _float_activations(folder, graph) as file:
        exact = measure(reference, lambda: Decoder(folder, model=file), 0)
    half = any(value.dtype == ir.DataType.FLOAT16 for value in graph.graph.inputs)
    half |= has_bytes(graph.graph)
    if reasons := faults(exact, half):
        where = _where(reference, folder, exact, TOLERANCE_HALF if half else TOLERANCE)
        cure = "the model may need more than 16 bits: use --target cpu" if half else other_way
        raise ProofError(f"the ONNX model differs from the checkpoint: {where}; {reasons}; nothing was written; {cure}")
    return exact


def faults(exact: Parity, half: bool) -> str:
    """What is wrong at float activations, in words; "" for a proof.

    In float32: a logit differs by more than TOLERANCE, or the most likely token of a position (ties aside) or a greedy token
    differs. In half precision: a logit differs by more than TOLERANCE_HALF, or fewer than AGREEMENT_HALF of the most likely
    tokens agree.
    """
    limit = TOLERANCE_HALF if half else TOLERANCE
    reasons = []
    if not exact.difference <= limit:
        reasons.append(f"logits differ by {exact.difference:.2g} standard deviations (at most {limit:g} allowed)")
    if exact.flipped and not half:
        reasons.append(f"{exact.flipped} of {exact.tokens} positions have another most likely token")
    if half and exact.top1_agreement < AGREEMENT_HALF:
        reasons.append(
            f"{100 * exact.top1_agreement:.1f} % of the most likely tokens agree (at least {100 * AGREEMENT_HALF:g} % required)"
        )
    if not half and exact.greedy_match_tokens < GREEDY_TOKENS:
        reasons.append(f"{exact.greedy_match_tokens} of {GREEDY_TOKENS} greedy tokens agree")
    return ", ".join(reasons)


def _where(reference: ReferenceLogits, folder: Path, exact: Parity, limit: float) -> str:
    """In which reading and in which layer the graph differs, in words."""
    if not exact.difference_whole <= limit:
        return first_mismatch(reference.model, folder, [[ids] for ids in reference.windows], limit)
    if not exact.difference_steps <= limit and exact.difference_chunks <= limit:
        return "only token by token"
    if not exact.difference_chunks <= limit:
        return "only through the cache, where " + first_mismatch(
            reference.model, folder, [_chunks(ids) for ids in reference.windows], limit
        )
    if not exact.difference_switch <= limit:
        return "only where the rotary frequencies change"
    return "only in a padded batch" if not exact.difference_batch <= limit else "in the most likely tokens"


def measure(reference: ReferenceLogits, open_decoder: Callable[[], Decoder], level: int) -> Parity:
    """Compare both models' logits over the windows, and greedy tokens after the first half of PROOF_TOKENS or fewer.

    The torch model runs only before the decoder is opened and after it is closed.
    """
    first = reference.windows[0]
    for ids in progress((*reference.windows, *_unequal(first)), "the checkpoint's logits", "text"):
        reference.logits(ids)
    across = crossings(reference) if level == 0 else []
    decoder, quality, singles = open_decoder(), Quality(), STEPS
    whole = chunks = steps = switch = 0.0
    flipped = 0 if level == 0 and decoder.dtype == np.float32 else None
    for ids in progress(reference.windows, f"the graph's logits, level {level}", "text"):
        truth = reference.logits(ids)
        decoder.reset()
        logits = decoder.feed(ids, keep=0)
        whole = max(whole, _difference(logits, truth))
        if flipped is not None:
            flipped += int((~_as_likely(truth, logits.argmax(-1), TIE * reference.spread)).sum())
        quality.add(ids, logits, truth)
        del logits
        chunks = max(chunks, _difference_in_pieces(decoder, _chunks(ids), truth))
        if singles:
            part = ids[:singles]
            steps = max(steps, _difference_in_pieces(decoder, np.split(part, len(part)), truth))
            singles -= len(part)
    batch = padded_batch(reference, decoder, first)
    for crossing in across:
        switch = max(switch, _difference(crossing.read_by(decoder), crossing.truth))
    decoder.reset()
    # of windows in a row, which are short where the vocabulary is large
    length = min(PROOF_TOKENS, decoder.context - GREEDY_TOKENS, *decoder.switches)
    joined = np.concatenate(reference.windows)[:length]
    prompt = joined[: len(joined) // 2]
    continued = list(decoder.greedy(prompt, GREEDY_TOKENS))
    del decoder
    figures = quality.figures()
    return Parity(
        level,
        sum(map(len, reference.windows)),
        whole / reference.spread,
        chunks / reference.spread,
        steps / reference.spread,
        batch / reference.spread,
        figures["top1_agreement"],
        figures["kl_mean"],
        _greedy_match(reference, prompt, continued),
        flipped,
        *quality.loss_change(),
        switch / reference.spread,
    )


def _difference(logits: np.ndarray, truth: np.ndarray) -> float:
    """Largest absolute difference, infinite if only ``logits`` are not finite. Raises ProofError if ``truth`` is not."""
    largest = 0.0
    for first in range(0, len(truth), ROWS):
        rows, reference = logits[first : first + ROWS], truth[first : first + ROWS]
        if not np.isfinite(reference).all():
            raise ProofError("the checkpoint's logits are not finite (NaN or Inf), so it is broken; give another one")
        largest = max(largest, float(np.abs(rows - reference).max()) if np.isfinite(rows).all() else float("inf"))
    return largest


def _as_likely(truth: np.ndarray, tokens: np.ndarray, margin: float) -> np.ndarray:
    """Which of ``tokens`` (positions,) are torch's most likely ones, or within ``margin`` of them: bool (positions,)."""
    likely: np.ndarray = truth.max(-1) - truth[np.arange(len(truth)), tokens] <= margin
    return likely


def _chunks(ids: np.ndarray) -> list[np.ndarray]:
    """A first part, one token, the rest: with and without a past, short and long."""
    return [part for part in np.split(ids, [len(ids) // 3, len(ids) // 3 + 1]) if len(part)]


def _difference_in_pieces(decoder: Decoder, pieces: list[np.ndarray], truth: np.ndarray) -> float:
    """The largest difference when the pieces are fed one after another through the cache."""
    decoder.reset()
    largest, done = 0.0, 0
    for piece in pieces:
        largest = max(largest, _difference(decoder.feed(piece, keep=0), truth[done : done + len(piece)]))
        done += len(piece)
    return largest


def _unequal(ids: np.ndarray) -> list[np.ndarray]:
    """The first STEPS tokens of a window, and about half as many of its last."""
    long = min(len(ids), STEPS)
    return [ids[:long], ids[-(long // 2 + 1) :]]


def padded_batch(reference: ReferenceLogits, decoder: Decoder, ids: np.ndarray) -> float:
    """Largest difference of a logit for two prompts of unequal length in one batch, each then continued by one token.

    Padding is on the side that the graph supports; each row must give the logits that it gives alone.
    """
    rows = _unequal(ids)
    long = len(rows[0])
    batch, mask = np.zeros((2, long - 1), dtype=np.int64), np.zeros((2, long - 1), dtype=np.int64)
    columns = [slice(long - len(row), None) if decoder.left_padding else slice(0, len(row) - 1) for row in rows]
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        batch[i, column], mask[i, column] = row[:-1], 1
    (first,), cache = decoder.step(batch, mask)
    last = np.array([[row[-1]] for row in rows])
    (second,), _ = decoder.step(last, np.concatenate([mask, np.ones_like(last)], axis=1), cache)
    return max(
        _difference(np.concatenate([first[i, column], second[i]]), reference.logits(row))
        for i, (row, column) in enumerate(zip(rows, columns, strict=True))
    )


def _greedy_match(reference: ReferenceLogits, prompt: np.ndarray, continued: list[int]) -> int:
    """How many of the decoder's greedy tokens precede the first that is not torch's greedy one or tied with it.

    torch reads the decoder's tokens in one forward: up to the first that it would not have chosen, they are its own.
    """
    ids = np.concatenate([prompt, np.array(continued[:-1], dtype=prompt.dtype)])
    truth = logits_as_read(reference.model, ids, len(continued))
    likely = _as_likely(truth, np.array(continued), TIE * reference.spread)
    return len(continued) if likely.all() else int(likely.argmin())


@contextmanager
def _float_activations(folder: Path, graph: ir.Model) -> Iterator[str]:
    """File name of the artifact's graph at accuracy level 0, over the same weights; a variant is deleted afterwards."""
    levels = [node.attributes["accuracy_level"] for node in graph.graph if node.op_type == "MatMulNBits" and node.domain == DOMAIN]
    if any(level.as_int() for level in levels):
        with variant(folder) as file:
            yield file
    else:
        yield MODEL
