"""A head whose rare tokens have 4 bits, beside 8 and 4 bits in all of its rows: what that loses, and what it weighs.

    python benchmarks/rare_tokens.py CHECKPOINT --text TEXT [--text TEXT] [--tokens 2048] [--calibration TEXT] [--shares 0.2,0.1]

The head (and the embedding, where the two are one matrix) rounded to nearest in groups of 64, all else float; KL against the float
model on texts of which the choice has seen nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import divergences
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS, SHARES, candidates, rounded_head, weights_of_tokens
from edgepress.pipeline.quantize.trials import HEAD_TOKENS, TRIAL_WINDOW
from edgepress.pipeline.text.windows import text_windows

GROUP = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--shares", type=lambda text: tuple(map(float, text.split(","))), default=SHARES)
    options = parser.parse_args()
    model = Checkpoint(options.checkpoint).model()
    blocks, head = Blocks(model), model.get_output_embeddings()
    rows, columns = head.weight.shape
    begun = time.perf_counter()
    read = text_windows(options.calibration, options.checkpoint, budget=HEAD_TOKENS, length=TRIAL_WINDOW)
    found = candidates(weights_of_tokens(blocks, read), options.shares)
    print(f"rare tokens of {HEAD_TOKENS} tokens: {time.perf_counter() - begun:.0f} s\n")
    texts = [text_windows(text, options.checkpoint, budget=options.tokens, length=TRIAL_WINDOW) for text in options.text]
    originals = [[blocks.logits(torch.from_numpy(ids)[None])[0] for ids in windows] for windows in texts]
    header = ["head", "rows of 4 bits", "their share", "MB", *(f"{text.stem}: KL, nats" for text in options.text)]
    print(f"| {' | '.join(header)} |\n| --- |{' ---: |' * (len(header) - 1)}")
    for one in (EIGHT_BITS, *reversed(found), FOUR_BITS):
        few = sum(part.stop - part.start for part, bits in one.parts(rows) if bits == FOUR_BITS.bits) / rows
        cells = [f"8 bits, 4 in rows {', '.join(one.rare)}" if one.rare else f"{one.bits} bits", f"{100 * few:.0f} %"]
        cells += [f"{100 * found[one]:.0f} %" if one in found else "", f"{one.bytes(rows, columns, GROUP) / 1e6:.1f}"]
        with rounded_head(head, one, GROUP):
            cells += [f"{_loss(blocks, windows, truth):.4f}" for windows, truth in zip(texts, originals, strict=True)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _loss(blocks: Blocks, windows: list[np.ndarray], originals: list[torch.Tensor]) -> float:
    """KL to the original logits, mean of all positions."""
    pairs = zip(windows, originals, strict=True)
    return float(torch.cat([divergences(truth, blocks.logits(torch.from_numpy(ids)[None])[0]) for ids, truth in pairs]).mean())


if __name__ == "__main__":
    main()
