"""Whether a model reads a text at all: a wrong language, encoding or format shows as a perplexity beyond reason."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

log = logging.getLogger("edgepress")
# Of SmolLM2-135M and of models of 10 M parameters, prose has a perplexity of 50, code and technical prose 20 to 470, base64,
# random characters and unknown scripts 240 to 30,000.
BEYOND_REASON = 1000.0


def readable(loss: float, vocabulary: int) -> bool:
    """Whether a loss, nats a token, is that of a text which the model can read.

    Its perplexity is at most BEYOND_REASON and at most half of the vocabulary, where guessing does hardly worse.
    """
    return bool(loss <= np.log(min(BEYOND_REASON, vocabulary / 2)))


def warn_unless_readable(loss: float, vocabulary: int, text: Path) -> None:
    """Log a warning when the loss, nats a token, is that of a text which the model cannot read."""
    if not readable(loss, vocabulary):
        log.warning(
            "warning: the model cannot read %s: its perplexity is %.4g, and prose that a model knows has 5 to 100; give a text in "
            "its language and encoding",
            text,
            np.exp(min(loss, 600.0)),
        )
