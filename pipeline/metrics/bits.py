"""Bits a byte of a text: what two models can be compared by whose tokenizers differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import exact_losses
from edgepress.pipeline.text.windows import beginning
from tokenizers import Tokenizer
from transformers import PreTrainedModel

_WINDOW = 512  # tokens


@dataclass(frozen=True)
class BitsPerByte:
    """bits: of each byte of UTF-8, on average. tokens: of the whole text."""

    bits: float
    tokens: int


def bits_per_byte(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> BitsPerByte:
    """Of a text in windows of 512 tokens; what a window begins with is not scored, unless BOS stands before it."""
    encoding, start = tokenizer.encode(text, add_special_tokens=False), beginning(tokenizer)
    length = max(2, min(_WINDOW, int(getattr(model.config.get_text_config(), "max_position_embeddings", _WINDOW))) - len(start))
    nats, scored, skipped = 0.0, 0, 0 if start else 1
    blocks, offsets = Blocks(model), encoding.offsets
    for first in range(0, len(encoding.ids) - 1, length):
        ids = encoding.ids[first : first + length]
        if len(ids) < 2:
            break
        with torch.inference_mode():
            losses = exact_losses(blocks, [np.array([*start, *ids], dtype=np.int64)], "document")
        nats += float(losses[max(0, len(start) - 1) :].sum())
        end = offsets[first + len(ids)][0] if first + len(ids) < len(offsets) else len(text)
        scored += len(text[offsets[first + skipped][0] : end].encode())
    return BitsPerByte(nats / np.log(2) / max(1, scored), len(encoding.ids))
