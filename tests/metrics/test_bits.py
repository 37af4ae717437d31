"""Bits a byte, against the loss that transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.bits import bits_per_byte
from edgepress.pipeline.text.windows import beginning


def test_bits_a_byte_do_not_depend_on_how_a_text_is_cut(tiny: Path) -> None:
    """The sum over a text of one window is what transformers' loss gives, over its bytes: BOS stands before it."""
    model, tokenizer = Checkpoint(tiny).model(), Checkpoint(tiny).tokenizer
    text = "The old house stood silent. Été, 2 山\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    found = bits_per_byte(model, tokenizer, text)
    with torch.inference_mode():
        row = torch.tensor([[*beginning(tokenizer), *ids]])
        loss = float(model(input_ids=row, labels=row).loss)
    assert found.tokens == len(ids)
    np.testing.assert_allclose(found.bits, loss * len(ids) / np.log(2) / len(text.encode()), rtol=1e-5)
