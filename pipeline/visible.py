"""What strangers wrote (names, texts, templates, a model's words) as characters that only show, and cannot steer a terminal.

Escape sequences can rewrite what stands on the screen, set the clipboard or the window's title; bidirectional overrides show a
text in another order than it has; a line break in a name looks like a line of edgepress's own.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters but tab and line feed, overrides and isolates of direction, and halves of surrogate pairs.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The same without what progress bars are drawn with: to the start of the line, and one line up.
_STEERING_BUT_BARS = re.compile(rf"(?!\r|\x1b\[A){_STEERING.pattern}")


def one_line(text: str) -> str:
    r"""A name or message in one line: every character that does not print becomes its escape, as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def plain_text(text: str) -> str:
    """A text of several lines: characters that steer become escapes, carriage returns are left out; joiners and marks stay."""
    return _STEERING.sub(lambda match: "" if match[0] == "\r" else _escape(match[0]), text)


def plain_progress(text: str) -> str:
    """``plain_text`` for what may draw progress bars."""
    return _STEERING_BUT_BARS.sub(lambda match: _escape(match[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
