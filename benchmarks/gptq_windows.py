"""GPTQ calibrated on the same tokens in windows of several lengths: KL to the float model on texts that it did not read.

    python benchmarks/gptq_windows.py CHECKPOINT --lengths 8192,256,128,64,32 --calibration wiki-first.txt --text stories.txt
        [--text ... --tokens 16384 --group-size 64 --text-tokens 1536 --work out/gptq-windows]

CHECKPOINT: a folder with float weights; quality_per_byte.py --off-grid makes one of a GGUF file whose weights lie on no grid.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path

import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import divergences
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize.pack import quantize_checkpoint
from edgepress.pipeline.text.windows import text_windows

JUDGED = 256  # tokens of a window of the texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lengths", default="256,64")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration text (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=1536)
    parser.add_argument("--work", type=Path, default=Path("out/gptq-windows"))
    options = parser.parse_args()
    original = Checkpoint(options.checkpoint).model()
    texts = {text.stem: text_windows(text, options.checkpoint, budget=options.text_tokens, length=JUDGED) for text in options.text}
    print(f"| tokens of a window | {' | '.join(texts)} |\n| ---: |{' ---: |' * len(texts)}")
    for length in map(int, options.lengths.split(",")):
        quantized = made(options, length).model()
        cells = [f"{kl(original, quantized, windows):.4f}" for windows in texts.values()]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)


def made(options: argparse.Namespace, length: int) -> Checkpoint:
    """The checkpoint by GPTQ, calibrated in windows of this length."""
    importlib.import_module("edgepress.pipeline.quantize.plan").WINDOW = length
    out = options.work / str(length)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    given = QuantizeOptions(
        method="gptq", group_size=options.group_size, calibration=options.calibration, calibration_tokens=options.tokens
    )
    quantize_checkpoint(Artifact.load(options.checkpoint), out, given, options.work / f"{length}.gptq")
    return Checkpoint(out)


@torch.inference_mode()
def kl(original: torch.nn.Module, quantized: torch.nn.Module, windows: list) -> float:
    """Mean KL(original || quantized), nats a token."""
    found = []
    for row in windows:
        ids = torch.from_numpy(row)[None]
        found.append(divergences(original(input_ids=ids).logits[0], quantized(input_ids=ids).logits[0]))
    return float(torch.cat(found).double().mean())


if __name__ == "__main__":
    main()
