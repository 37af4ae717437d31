"""Words that several rooms show to people, so that all of them spell them alike."""

from __future__ import annotations

# What a checkpoint is after a stage: the name of its row in a report.
PAST_TENSE = {
    "trim": "trimmed",
    "prune": "pruned",
    "heal": "healed",
    "narrow": "narrowed",
    "quantize": "quantized",
    "tune": "tuned",
}
