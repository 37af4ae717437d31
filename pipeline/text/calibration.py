"""Disjoint sets of windows: which text ranks, teaches, chooses and judges."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OptionError, TextError
from edgepress.pipeline.files import sha256
from edgepress.pipeline.options import PRUNE_TOKENS, HealOptions, PruneOptions
from edgepress.pipeline.text.windows import context_length, text_windows

# Longer windows tell the blocks apart no better, and their logits fill the memory of a laptop.
LONGEST_WINDOW = 1024
SHORTEST_WINDOW = 8


def calibration(folder: Path, options: PruneOptions | HealOptions) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows that rank the blocks, and windows that judge the result: the last quarter of the text.

    Raises TextError when the text has fewer tokens than were asked for, or too few to hold any out.
    """
    exact = options.calibration_tokens is not None
    windows = even_windows(options.calibration, folder, options.calibration_tokens or PRUNE_TOKENS, options.calibration_skip, exact)
    held_out = len(windows) // 4
    return windows[:-held_out], windows[-held_out:]


def even_windows(path: Path, folder: Path, budget: int, skip: int = 0, exact: bool = False) -> list[np.ndarray]:
    """At least seven windows of one length, so that a share of them is that share of the text; a ragged end is left out."""
    few = text_windows(path, folder, budget=budget, skip=skip, length=SHORTEST_WINDOW, exact=exact)
    tokens = sum(map(len, few))
    if len(few) < 8:
        raise TextError(f"{path} is too short: {tokens} tokens, at least {8 * SHORTEST_WINDOW} are needed; give a longer text")
    length = max(SHORTEST_WINDOW, min(LONGEST_WINDOW, context_length(folder), min(budget, tokens) // 8))
    windows = text_windows(path, folder, budget=budget, skip=skip, length=length, exact=exact)
    return [row for row in windows if len(row) == len(windows[0])]


OTHER_TEXT_TOKENS = 8192
FEWEST = 32  # tokens in each part of the texts


@dataclass(frozen=True)
class Texts:
    """Windows of which none is in two sets: healed on; of the same kind and of another, strengths chosen on and judged on."""

    fit: list[np.ndarray]
    selection: list[np.ndarray]
    judging: list[np.ndarray]
    other_selection: list[np.ndarray]
    other: list[np.ndarray]


def split(original: Path, options: HealOptions) -> Texts:
    """Calibration windows in order: three quarters to learn from, an eighth to choose by, an eighth to judge by.

    Of the other text one half chooses and one judges.
    """
    fit, held_out = calibration(original, options)
    texts = Texts(fit, *_halves(held_out), *_halves(even_windows(options.other_text, original, OTHER_TEXT_TOKENS)))
    sets = [getattr(texts, field.name) for field in fields(texts)]
    if any(sum(len(row) - 1 for row in rows) < FEWEST for rows in sets):
        raise TextError(f"too little text to heal and to judge by: {FEWEST} tokens are needed in each part; give a longer text")
    if sha256(options.other_text) == sha256(options.calibration):
        raise OptionError("--other-text is the --calibration text, and healing would judge itself; give another --other-text")
    return texts


def _halves(windows: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first windows and the last; a single one is cut in two."""
    if len(windows) == 1:
        middle = len(windows[0]) // 2
        windows = [windows[0][:middle], windows[0][middle:]]
    half = len(windows) // 2
    return windows[:half], windows[half:]
