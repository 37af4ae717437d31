"""Text that ends where a stop word begins."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Passes text on, but for an end that may become a stop word. found: whether one came."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What can be shown now; nothing after a stop word."""
        if self.found:
            return ""
        text = self._held + text
        if places := [place for word in self._words if (place := text.find(word)) >= 0]:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((size for word in self._words for size in range(1, len(word)) if text.endswith(word[:size])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back when the text ended without a stop word."""
        held, self._held = self._held, ""
        return held
