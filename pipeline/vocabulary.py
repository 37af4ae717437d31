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
# What a removal takes of each layer: nothing less than the layer itself, or a part.
PARTS = {"blocks": "", "attention": "attention", "feed-forward": "feed-forward part"}
# What a stage takes and leaves, in words.
FORMATS = {
    "gguf": "a GGUF file", "hf": "a float checkpoint", "codes": "a checkpoint with the integers of its GGUF file",
    "packed": "a quantized checkpoint", "onnx": "an ONNX artifact", "report": "a benchmark", "page": "a page",
}  # fmt: skip
