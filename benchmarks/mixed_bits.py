"""What bits between 4 and 8 cost: the blocks' matrices rounded to nearest, some kinds at 8 bits, KL against the float model.

    python benchmarks/mixed_bits.py CHECKPOINT --text WIKITEXT [--tokens 1024] [--skip 4000]

Bytes are those of the packed blocks, scales and zero points counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.text.windows import text_windows
from transformers.pytorch_utils import Conv1D

WINDOW = 256
WIDE, NARROW, FINE = (8, 64), (4, 64), (4, 32)  # bits, group


def some(kinds: tuple[str, ...], at: tuple[int, int], rest: tuple[int, int]) -> Callable[[str], tuple[int, int]]:
    """Matrices whose name holds one of ``kinds`` at one setting, the rest at another."""
    return lambda name: at if any(kind in name for kind in kinds) else rest


SETTINGS = {
    "all 4 bits, groups of 64": some((), WIDE, NARROW),
    "all 4 bits, groups of 32": some((), WIDE, FINE),
    "attention 8, rest 4": some(("attn",), WIDE, NARROW),
    "down projections 8, rest 4": some(("down_proj",), WIDE, NARROW),
    "down, value and output projections 8, rest 4 in groups of 32": some(("down_proj", "v_proj", "o_proj"), WIDE, FINE),
    "gate and up projections 4 in groups of 32, rest 8": some(("gate_proj", "up_proj"), FINE, WIDE),
    "gate projections 4 in groups of 32, rest 8": some(("gate_proj",), FINE, WIDE),
    "all 8 bits": some((), NARROW, WIDE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--skip", type=int, default=4000)
    options = parser.parse_args()
    model = Checkpoint(options.checkpoint).model()
    windows = text_windows(options.text, options.checkpoint, budget=options.tokens, skip=options.skip, length=WINDOW)
    references = [logits_of(model, ids) for ids in windows]
    linears = block_linears(model)
    weights = {name: module.weight.detach().clone() for name, module in linears.items()}
    print("| blocks | MB | KL, nats | perplexity |\n| --- | ---: | ---: | ---: |")
    for title, setting in SETTINGS.items():
        total = 0
        for name, module in linears.items():
            turned = isinstance(module, Conv1D)
            weight = weights[name].T if turned else weights[name]
            packed = round_to_nearest(name, weight.contiguous().numpy(), *setting(name), symmetric=False)
            restored = packed.dequantized()
            module.weight.data.copy_(torch.from_numpy(restored.T if turned else restored))
            total += packed.nbytes
        scores = Quality()
        for ids, reference in zip(windows, references, strict=True):
            scores.add(ids, logits_of(model, ids), reference)
        growth = 100 * np.expm1(scores.loss_change()[0])
        print(f"| {title} | {total / 1e6:.1f} | {scores.figures()['kl_mean']:.4f} | {growth:+.1f} % |", flush=True)


if __name__ == "__main__":
    main()
