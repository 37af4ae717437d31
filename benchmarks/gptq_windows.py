"""GPTQ calibrated on the same tokens in windows of several lengths: KL to the float model on texts that it did not read.

    python benchmarks/gptq_windows.py CHECKPOINT --lengths 8192,256,128,64,32 --calibration wiki-first.txt --text stories.txt
        [--text ... --method gptq --method gptqmodel --tokens 16384 --group-size 64 --bits 4 --head-bits 8 --act-order]
        [--in-order --whole-ranges --rounded-head --damping 0.05 --unmoved --uncapped --text-tokens 1536 --work out/gptq-windows]

CHECKPOINT: a folder with float weights; quality_per_byte.py --off-grid makes one of a GGUF file whose weights lie on no grid.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import time
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
    parser.add_argument("--method", action="append", help="gptq, gptqmodel or rtn, any number of them (default: gptq)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--head-bits", type=int, default=8)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--in-order", action="store_true", help="gptq takes the columns as they come")
    parser.add_argument("--whole-ranges", action="store_true", help="gptq cuts no range")
    parser.add_argument("--rounded-head", action="store_true", help="gptq rounds a head of few bits")
    parser.add_argument("--damping", type=float, help="of gptq (default: as the stage has it)")
    parser.add_argument("--uncapped", action="store_true", help="gptq counts the longest inputs in full")
    parser.add_argument("--unmoved", action="store_true", help="gptq makes up for nothing that earlier matrices lost")
    parser.add_argument("--text-tokens", type=int, default=1536)
    parser.add_argument("--work", type=Path, default=Path("out/gptq-windows"))
    options = parser.parse_args()
    original = Checkpoint(options.checkpoint).model()
    texts = {text.stem: text_windows(text, options.checkpoint, budget=options.text_tokens, length=JUDGED) for text in options.text}
    algorithm = importlib.import_module("edgepress.pipeline.quantize.gptq")
    if options.in_order:
        algorithm.group_order = lambda diagonal, group_size: torch.arange(len(diagonal))
    if options.whole_ranges:
        algorithm.SHARES = (1.0,)
    algorithm.LOSSLESS = 0 if options.rounded_head else algorithm.LOSSLESS
    inputs = importlib.import_module("edgepress.pipeline.quantize.inputs")
    inputs.DAMPING = options.damping or inputs.DAMPING
    if options.uncapped:
        inputs.LONGEST = float("inf")
    if options.unmoved:
        inputs.originals = lambda stream, modules: {}
    print(f"| method | tokens of a window | {' | '.join(texts)} | s |\n| --- | ---: |{' ---: |' * (len(texts) + 1)}")
    for method in options.method or ["gptq"]:
        for length in map(int, options.lengths.split(",")):
            begun = time.monotonic()
            quantized, seconds = made(options, method, length).model(), time.monotonic() - begun
            cells = [f"{kl(original, quantized, windows):.4f}" for windows in texts.values()]
            print(f"| {method} | {length} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def made(options: argparse.Namespace, method: str, length: int) -> Checkpoint:
    """The checkpoint quantized, calibrated in windows of this length."""
    importlib.import_module("edgepress.pipeline.quantize.plan").WINDOW = length
    out = options.work / f"{method}-{length}"
    for folder in (out, out.with_suffix(".scratch")):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    given = QuantizeOptions(
        method=method,
        group_size=options.group_size,
        bits=options.bits,
        head_bits=options.head_bits,
        act_order=options.act_order and method != "rtn",
        calibration=options.calibration,
        calibration_tokens=options.tokens,
    )
    quantize_checkpoint(Artifact.load(options.checkpoint), out, given, out.with_suffix(".scratch"))
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
