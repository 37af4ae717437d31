"""What each way to quantize costs in quality and gives in bytes, on text that the model has not seen.

    python benchmarks/quantization_table.py models/reference models/reference/evaluation.txt
    python benchmarks/quantization_table.py ../shared/models/babyllama-361 ../shared/data/tinystories-val/tinystories_val.txt \
        --calibration ../shared/data/tinystories-val/tinystories_val.txt --skip 32768

Prints Markdown. Every row is a run of the quantize stage, kept in --work, so that an interrupted table goes on. Quality is of
the dequantized weights in torch, float activations. Bits per weight and bytes are those that the operators store: codes,
scales, zero points, permutations, the head, and what stays float in 32 bits. The change of perplexity has its standard error,
from the differences of the losses token by token: below about twice that, two perplexities are the same. The column "to rtn"
is the same difference to the row of round-to-nearest that has the same bits, groups and symmetry.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.checkpoint.shards import shapes_of
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
from edgepress.pipeline.text.windows import text_windows

GROUPS = (128, 64, 32)


def recipes() -> Iterator[tuple[str, dict[str, object]]]:
    """(what the row is called, options of the quantize stage)."""
    for bits in (4, 3):
        for group in GROUPS:
            for symmetric in (True, False):
                common = {"bits": bits, "group_size": group, "symmetric": symmetric}
                kind = f"{bits} bits, groups of {group}, {'symmetric' if symmetric else 'asymmetric'}"
                yield f"rtn, {kind}", common | {"method": "rtn"}
                yield f"gptq, {kind}", common | {"method": "gptq"}
                yield f"gptq, {kind}, act-order", common | {"method": "gptq", "act_order": True}
    for method in ("nf4", "fp4", "int8"):
        yield f"{method}", {"method": method}
    for bits in (16, 4):
        yield f"gptq, 4 bits, groups of 64, asymmetric; head {bits} bits", {"group_size": 64, "head_bits": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="held-out text")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of it (default: 8192)")
    parser.add_argument("--skip", type=int, default=0, help="tokens to leave out at its beginning (default: 0)")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    parser.add_argument("--work", type=Path, default=Path("out/quantization-table"), help="folder for the checkpoints")
    options = parser.parse_args()
    logging.disable()
    windows = text_windows(options.text, options.model, budget=options.tokens, skip=options.skip)
    whole = [logits_of(load_model(options.model), row) for row in windows]
    print(f"{options.model.name}, {sum(len(row) - 1 for row in windows):,} tokens of {options.text.name}\n")
    print("| weights | perplexity | change | to rtn | KL | top-1 | bits per weight | bytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    original, truth = quality(windows, whole, whole)
    stored = 4 * sum(math.prod(shape) for shape in shapes_of(options.model).values())
    line("original, float32", original, difference(truth, truth), "", 32, stored)
    rounded: dict[tuple[object, ...], np.ndarray] = {}
    for name, settings in recipes():
        if options.only not in name:
            continue
        recipe = QuantizeOptions(**{"method": "gptq", "calibration": options.calibration, **settings})  # type: ignore[arg-type]
        parts = [str(v) for f in dataclasses.fields(recipe) if f.name != "calibration" for v in [getattr(recipe, f.name)]]
        folder = options.work / options.model.name / "-".join(parts)
        run("quantize", Artifact.load(options.model), folder, recipe)
        model = load_model(folder)
        found, losses = quality(windows, [logits_of(model, row) for row in windows], whole)
        setting = (recipe.bits, recipe.group_size, recipe.symmetric, recipe.head_bits)
        if recipe.method == "rtn":
            rounded[setting] = losses
        to_rtn = difference(losses, rounded[setting]) if recipe.method == "gptq" and setting in rounded else ""
        file = PackedFile(folder)
        left = 4 * sum(math.prod(shape) for shape in shapes_of(folder).values())
        linears = [file[n] for n in file]
        stored = sum(linear.nbytes for linear in linears)
        bits = 8 * stored / sum(linear.shape[0] * linear.shape[1] for linear in linears)
        line(name, found, difference(losses, truth), to_rtn, bits, stored + left)


def quality(windows: list[np.ndarray], found: list[np.ndarray], whole: list[np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
    """Figures, and the loss of every token in nats."""
    scores = Quality()
    for ids, ours, theirs in zip(windows, found, whole, strict=True):
        scores.add(ids, ours, theirs)
    return scores.figures(), np.concatenate(scores.losses)


def difference(losses: np.ndarray, others: np.ndarray) -> str:
    """By how much the perplexity differs, with the standard error of the mean difference in nats, nearly the same share."""
    apart = losses - others
    return f"{100 * math.expm1(float(apart.mean())):+.2f} ± {100 * float(apart.std()) / math.sqrt(apart.size):.2f} %"


def line(name: str, found: dict[str, float], change: str, to_rtn: str, bits: float, stored: int) -> None:
    cells = (
        name,
        f"{found['perplexity']:.3f}",
        change,
        to_rtn,
        f"{found['kl_mean']:.4f}",
        f"{100 * found['top1_agreement']:.1f} %",
        f"{bits:.2f}",
        f"{stored:,}",
    )
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
