"""Which pieces of a vocabulary stay: what any text may need, what given texts use, and the most frequent of the rest.

Vocabulary trimming after Ushio et al. 2023 (sections 3.1 and 3.2), with the merges of BPE.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.text.pieces import Pieces

# ISO 639-1 code -> the first words of the Unicode names of its letters.
_SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("af", "ca", "cs", "cy", "da", "de", "en", "es", "et", "eu", "fi", "fr", "ga", "gl"), ("LATIN",)),
    **dict.fromkeys(("hr", "hu", "id", "is", "it", "lt", "lv", "ms", "mt", "nl", "no", "pl", "pt", "ro"), ("LATIN",)),
    **dict.fromkeys(("sk", "sl", "sq", "sv", "sw", "tl", "tr", "vi"), ("LATIN",)),
    **dict.fromkeys(("be", "bg", "kk", "ky", "mk", "mn", "ru", "sr", "tg", "uk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa", "ps", "ur"), ("ARABIC",)),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), ("DEVANAGARI",)),
    **dict.fromkeys(("as", "bn"), ("BENGALI",)),
    "am": ("ETHIOPIC",), "el": ("GREEK",), "gu": ("GUJARATI",), "he": ("HEBREW",), "hy": ("ARMENIAN",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"), "ka": ("GEORGIAN",), "km": ("KHMER",), "kn": ("KANNADA",), "ko": ("HANGUL",),
    "lo": ("LAO",), "ml": ("MALAYALAM",), "my": ("MYANMAR",), "pa": ("GURMUKHI",), "si": ("SINHALA",), "ta": ("TAMIL",),
    "te": ("TELUGU",), "th": ("THAI",), "zh": ("CJK",),
}  # fmt: skip
_PLAIN = ("MODIFIER", "MICRO", "FEMININE", "MASCULINE", "SUPERSCRIPT", "DOUBLE-STRUCK", "SCRIPT", "MATHEMATICAL", "OHM", "KELVIN")


def scripts_of(languages: Iterable[str]) -> frozenset[str]:
    """The scripts that languages are written in, by their ISO 639-1 codes. Raises OptionError for one that is not known."""
    codes = [code.lower() for code in languages]
    if unknown := [code for code in codes if code not in _SCRIPTS]:
        raise OptionError(f"--languages {unknown[0]}: not known; give two-letter codes such as en, de or zh, or --keep-text FILE")
    return frozenset(script for code in codes for script in _SCRIPTS[code])


def is_written_in(text: str, scripts: Collection[str]) -> bool:
    """Whether every letter of a text is of one of the scripts; all else belongs to every language."""
    return all(not character.isalpha() or _script(character) in (*scripts, *_PLAIN) for character in text)


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    return unicodedata.name(character, "?").partition(" ")[0].partition("-")[0]


@dataclass(frozen=True)
class Wish:
    """counts: how often the texts use each id, (ids,). must: ids that stay whatever they are. count: of pieces in all.

    texts_stay: whether every piece that the texts use stays. scripts: of the languages that are wanted, empty for all.
    """

    counts: np.ndarray
    must: frozenset[int]
    count: int | None = None
    texts_stay: bool = True
    scripts: frozenset[str] = frozenset()


def choose(pieces: Pieces, wish: Wish) -> frozenset[int]:
    """Ids of the pieces that stay. Raises OptionError where fewer are wanted than must stay, or as many as there are."""
    kept = set(wish.must)
    for number in pieces.base:
        if not _foreign(pieces, number, wish):
            kept |= pieces.parts(number) | {number}  # a character of three bytes is merged of two first
    always = len(kept)
    used = np.flatnonzero(wish.counts)
    if wish.texts_stay:
        for number in used.tolist():
            kept |= pieces.parts(number)
    if wish.count is not None and not len(kept) <= wish.count < len(pieces.names):
        texts = f", {len(kept) - always:,} more are used by the texts" if len(kept) > always else ""
        raise OptionError(
            f"--keep-tokens {wish.count:,} is not possible: {always:,} must stay (bytes, characters, special tokens){texts}, and "
            f"there are {len(pieces.names):,}; give a number from {len(kept):,} to {len(pieces.names) - 1:,}"
        )
    if wish.count is not None or wish.scripts:
        for number in _by_rank(pieces, wish.counts):
            if wish.count is not None and len(kept) >= wish.count:
                break
            if number in kept or _foreign(pieces, number, wish):
                continue
            parts = pieces.parts(number) - kept
            if wish.count is None or len(kept) + len(parts) <= wish.count:
                kept |= parts
    return frozenset(kept)


def _by_rank(pieces: Pieces, counts: np.ndarray) -> Sequence[int]:
    """Pieces, the most frequent in the texts first, then those that the tokenizer learnt first."""
    return sorted(pieces.names, key=lambda number: (-int(counts[number]), pieces.order(number)))


def _foreign(pieces: Pieces, number: int, wish: Wish) -> bool:
    """Whether a piece is written in none of the wanted languages, and can be written otherwise."""
    if not wish.scripts or wish.counts[number] or number in wish.must:
        return False
    text = pieces.text(number)
    if text is None:  # single bytes stay; of longer ones, half a character
        return number not in pieces.base
    return pieces.loses_nothing and not is_written_in(text, wish.scripts)
