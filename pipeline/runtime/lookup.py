"""Lookup decoding: what followed the last tokens earlier in the text is guessed to follow again, and one pass checks the guess.

After prompt lookup decoding (Saxena 2023) and "Inference with Reference" (Yang et al. 2023, section 3). A pass over a few tokens
takes little longer than over one, as a decoding step waits for the weights. How many are guessed is what pays by the guesses that
came true so far; where none pays, none is made, and those that would have been are kept score of, at no cost, until they pay again.

All is a function of the text. Passes are not timed for it: a row is rounded otherwise alone than among others, and what a model
writes would depend on what else the machine does.
"""

from __future__ import annotations

from collections.abc import Iterable

MATCHES = (8, 4, 3, 2)  # last tokens that must have stood in the text before
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens guessed at once
# A pass over n tokens takes as long as 1 + TOKEN (n - 1) passes over one, measured by benchmarks/lookup.py (docs/generating.md).
TOKEN = 0.15
MEMORY = 0.9  # of the score: half of it is of the last seven guesses
FIRST_SCORE = 0.5
MARGIN = 1.02  # that guessing must promise over not guessing


class Lookup:
    """The text so far, indexed by its runs of tokens, and what guesses from it were worth."""

    def __init__(self, ids: Iterable[int]) -> None:
        """ids: of the text so far, which tells how much of it was foreseeable."""
        self._ids: list[int] = []
        # A run of tokens -> position behind its last occurrence, that at the end of the text left out.
        self._ends: dict[tuple[int, ...], int] = {}
        self._scores = dict.fromkeys(MATCHES, FIRST_SCORE)  # length of the match -> share of guesses that came true
        for id in ids:
            self.append(id)

    def append(self, id: int) -> None:
        """The token that came next: what would have been guessed is scored by it."""
        match, position = self._match()
        if match:
            hit = self._ids[position] == id
            self._scores[match] += (1 - MEMORY) * (hit - self._scores[match])
        end = len(self._ids)
        for length in MATCHES:  # what ends the text is indexed once it has a successor
            if end >= length:
                self._ends[tuple(self._ids[-length:])] = end
        self._ids.append(id)

    def guess(self, limit: int) -> list[int]:
        """What may come next, as many tokens as pay, up to ``limit``: often none."""
        match, position = self._match()
        if not match:
            return []
        share, best, gain = self._scores[match], 0, MARGIN
        for count in COUNTS:
            if count > limit:
                break
            expected = sum(share**n for n in range(count + 1))  # tokens that the pass yields
            if (rate := expected / self._cost(count + 1)) > gain:
                best, gain = count, rate
        following = self._ids[position:]
        return [following[number % len(following)] for number in range(best)]  # the end of the text may repeat itself

    @staticmethod
    def _cost(count: int) -> float:
        return 1 + TOKEN * (count - 1)

    def _match(self) -> tuple[int, int]:
        """How many of the last tokens stood in the text before, and the position behind them; 0 where too few did."""
        for length in MATCHES:
            position = self._ends.get(tuple(self._ids[-length:]))
            if position is not None and len(self._ids) >= length:
                return length, position
        return 0, 0
