"""From a text to windows of token ids: the same ids for calibration, for the original and for the artifact."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import ModelError, TextError
from edgepress.pipeline.model_files import read_config
from edgepress.pipeline.text.reading import KEY, read_text
from edgepress.pipeline.text.tokenizer import tokenizer_of
from tokenizers import Tokenizer

# Longer windows would take minutes each on a laptop, and far less distinguishes the models that reach this.
LONGEST_WINDOW = 2048
# For the proof of an export: tokens that it reads at least, and that it generates.
PROOF_TOKENS, GREEDY_TOKENS = 512, 32
# Logits of one of its windows: 134 MB in float32, of which torch, onnxruntime and the comparison hold a copy each.
PROOF_LOGITS = 2**25
# How the name of a file ends that holds token ids in place of a text: what --calibration self keeps.
IDS = ".ids.npz"


def read_ids(path: Path) -> np.ndarray:
    """The token ids of a file of them, int64 (tokens,). Raises TextError when it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ids: np.ndarray = file["ids"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise TextError(f"{path} is no whole file of token ids; delete it, and give a text or 'self'") from error
    return ids.astype(np.int64)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint or artifact, as transformers makes it. Raises ModelError when it has none."""
    return tokenizer_of(folder)


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The special ids that the tokenizer puts before a text: BOS for most models, nothing for some."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    marked = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return list(marked[:start])
    return []


def context_length(folder: Path) -> int:
    """Tokens in a window: the model's context, at most LONGEST_WINDOW."""
    config = read_config(folder)
    lengths = [config[key] for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length") if config.get(key)]
    if not all(isinstance(value, int) for value in lengths):
        raise ModelError(f"{folder / 'config.json'} gives its context as {lengths[0]!r}; it must be a whole number")
    return int(min([LONGEST_WINDOW, *lengths]))


def vocabulary(folder: Path) -> int | None:
    """Rows of the embedding, by config.json; None where it does not say."""
    size = read_config(folder).get("vocab_size")
    return size if type(size) is int else None


def same_tokens(one: Path, other: Path, text: str) -> bool:
    """Whether two models read a text alike and have as many tokens, so that what they predict can be compared."""
    alike = load_tokenizer(one).encode(text).ids == load_tokenizer(other).encode(text).ids
    return alike and vocabulary(one) == vocabulary(other)


def check_ids(ids: Sequence[int], tokenizer: Tokenizer, size: int | None, where: str) -> None:
    """Raise TextError for ids beyond the embedding: a token that was added to the tokenizer and never to the model."""
    if size is not None and ids and (highest := max(ids)) >= size:
        raise TextError(
            f"{where} has the token {tokenizer.id_to_token(highest)!r}, number {highest}, beyond the {size} rows of the model's "
            "embedding; leave it out, or give the model with its own tokenizer"
        )


def proof_window(folder: Path) -> int:
    """Tokens in a window that an export is proven on: greedy tokens must fit into the context behind it.

    At most PROOF_TOKENS, fewer where the vocabulary is large. Raises ModelError for a context that is too short.
    """
    context = context_length(folder)
    if context < GREEDY_TOKENS + 8:
        raise ModelError(
            f"a context of {context} tokens is too short for the proof of an export, it takes {GREEDY_TOKENS + 8}; "
            "give a model with a longer context"
        )
    return min(context - GREEDY_TOKENS, PROOF_TOKENS, max(PROOF_TOKENS // 8, PROOF_LOGITS // (vocabulary(folder) or 1)))


def text_windows(
    path: Path,
    folder: Path,
    *,
    budget: int,
    skip: int = 0,
    length: int | None = None,
    shortest: int = 2,
    seed: int | None = None,
    exact: bool = False,
    key: str = KEY,
) -> list[np.ndarray]:
    """Cut ``budget`` tokens of a text, after ``skip``, into windows of the context of the model in ``folder``.

    Every window is an int64 array of at most ``length`` ids (default: the context) that begins with the
    tokenizer's BOS where it has one; the last may be shorter and is dropped under ``shortest`` ids.
    No window is padded, so every id after the first is real text to be scored. The tokens counted are those of
    the text itself. With a seed, whole windows are drawn from all of the text after ``skip``, in the order of the draw.
    key: see read_text. Raises TextError for a text shorter than one window, or (``exact``) than the budget, and for one with tokens
    that the model has no row for.
    """
    tokenizer = load_tokenizer(folder)
    length = length or context_length(folder)
    ids = ids_of(path, tokenizer, skip + budget if seed is None else None, key)
    ids = ids[skip : skip + budget] if seed is None else ids[skip:]
    start = beginning(tokenizer)
    check_ids([*start, *ids], tokenizer, vocabulary(folder), str(path))
    body = length - len(start)
    if len(ids) < min(body, budget):
        after = f" after the {skip} skipped" if skip else ""
        raise TextError(f"{path} is too short: {len(ids)} tokens{after}, one window takes {body}; give a longer text")
    if exact and len(ids) < budget:
        raise TextError(f"{path} is too short: {len(ids)} tokens, {budget} were asked for; give a longer text or ask for fewer")
    if seed is not None and len(ids) > budget:
        firsts = np.random.default_rng(seed).permutation(len(ids) // body)[: max(1, budget // body)] * body
        return [_window(start, ids, first, body) for first in firsts]
    rows = [_window(start, ids, first, body) for first in range(0, len(ids), body)]
    return [row for row in rows if len(row) >= max(shortest, 2)]


def ids_of(path: Path, tokenizer: Tokenizer, count: int | None, key: str = KEY) -> list[int]:
    """More than ``count`` token ids of a text's beginning, or all there are; of a file of ids those that it holds."""
    ids: list[int]
    if path.name.endswith(IDS):
        ids = read_ids(path).tolist()
        return ids
    # Characters enough for the budget, by doubling: a long novel need not be tokenized to its end.
    text = read_text(path, key)
    characters = len(text) if count is None else 8 * count
    while True:
        ids = tokenizer.encode(text[:characters], add_special_tokens=False).ids
        if characters >= len(text) or (count is not None and len(ids) > count):
            return ids
        characters *= 2


def _window(start: list[int], ids: list[int], first: int, body: int) -> np.ndarray:
    """One window: ``start``, once, and ``body`` ids from ``first`` on; a text of the model's own brings its BOS."""
    if start and ids[first : first + len(start)] == start:
        first += len(start)
    return np.asarray(start + ids[first : first + body], dtype=np.int64)


def padded(windows: list[np.ndarray], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows stacked in order, at most ``size`` at a time: ids (batch, longest) and which of them are real, not padding.

    Padding stands on the right, where no real token of a causal model sees it; its id means nothing.
    """
    stacked = []
    for first in range(0, len(windows), size):
        rows = windows[first : first + size]
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        real = np.zeros(ids.shape, dtype=bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)], real[number, : len(row)] = row, True
        stacked.append((ids, real))
    return stacked
