"""Disjoint sets of windows: which part of a text ranks blocks, teaches, selects and judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OptionError, TextError
from edgepress.pipeline.files import sha256
from edgepress.pipeline.options import PRUNE_TOKENS, HealOptions, NarrowOptions, PruneOptions, TuneOptions
from edgepress.pipeline.text.reading import KEY
from edgepress.pipeline.text.windows import context_length, text_windows

# Longer windows distinguish the blocks no better, and their logits fill the memory of a laptop.
LONGEST_CALIBRATION_WINDOW = 1024
SHORTEST_WINDOW = 8
OTHER_TEXT_TOKENS = 8192
FEWEST = 32  # tokens in each set


def calibration(
    folder: Path, options: PruneOptions | HealOptions | NarrowOptions | TuneOptions, longest: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows that rank the blocks or teach a healer, and held-out windows that judge the result: the last quarter of the text.

    longest: tokens in a window. Raises TextError when the text has fewer tokens than requested, or too few to hold any
    out.
    """
    exact = options.calibration_tokens is not None
    budget, skip, key = options.calibration_tokens or PRUNE_TOKENS, options.calibration_skip, options.text_key
    windows = even_windows(options.calibration, folder, budget, skip, exact, key, longest)
    held_out = len(windows) // 4
    return windows[:-held_out], windows[-held_out:]


def even_windows(
    path: Path,
    folder: Path,
    budget: int,
    skip: int = 0,
    exact: bool = False,
    key: str = KEY,
    longest: int | None = None,
) -> list[np.ndarray]:
    """At least seven windows of one length, so that a share of them is that share of the text; a ragged end is dropped."""
    shortest = text_windows(path, folder, budget=budget, skip=skip, length=SHORTEST_WINDOW, exact=exact, key=key)
    tokens = sum(map(len, shortest))
    if len(shortest) < 8:
        raise TextError(f"{path} is too short: {tokens} tokens, at least {8 * SHORTEST_WINDOW} are needed; give a longer text")
    length = max(SHORTEST_WINDOW, min(longest or LONGEST_CALIBRATION_WINDOW, context_length(folder), min(budget, tokens) // 8))
    windows = text_windows(path, folder, budget=budget, skip=skip, length=length, exact=exact, key=key)
    return [row for row in windows if len(row) == len(windows[0])]


@dataclass(frozen=True)
class HealingSets:
    """Disjoint sets of windows for healing, each a list of token ids (length,) int64.

    fit: what a healer learns from. selection, judging: the same text, held out; strengths are chosen on the first, and the
    result is judged on the second. other_selection, other: the same for a text of another kind.
    """

    fit: list[np.ndarray]
    selection: list[np.ndarray]
    judging: list[np.ndarray]
    other_selection: list[np.ndarray]
    other: list[np.ndarray]


def healing_sets(original: Path, options: HealOptions | TuneOptions, longest: int | None = None) -> HealingSets:
    """Calibration windows in order, three quarters, an eighth, an eighth; the windows of the other text in halves.

    original: the folder whose tokenizer and context apply. longest: tokens in a window. Raises TextError when a set has
    too few tokens, OptionError when the other text is the calibration text.
    """
    fit, held_out = calibration(original, options, longest)
    sets = HealingSets(fit, *_halves(held_out), *other_halves(original, options, longest))
    for windows in (sets.fit, sets.selection, sets.judging, sets.other_selection, sets.other):
        if sum(len(row) - 1 for row in windows) < FEWEST:
            raise TextError(f"too little text to learn from and to judge on: each set needs {FEWEST} tokens; give a longer text")
    return sets


def other_halves(
    folder: Path, options: PruneOptions | HealOptions | TuneOptions, longest: int | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows of the text of another kind: the half that chooses and the half that judges.

    Raises TextError as ``calibration``, OptionError when it is the calibration text.
    """
    if sha256(options.other_text) == sha256(options.calibration):
        raise OptionError("--other-text is the --calibration text, which would judge what it taught; give another --other-text")
    return _halves(even_windows(options.other_text, folder, OTHER_TEXT_TOKENS, key=options.text_key, longest=longest))


def _halves(windows: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first half of the windows and the second; a single window is divided in two."""
    if len(windows) == 1:
        middle = len(windows[0]) // 2
        windows = [windows[0][:middle], windows[0][middle:]]
    half = len(windows) // 2
    return windows[:half], windows[half:]
