"""What healing wins back: perplexity, KL and top-1 of a model without layers, plain, and healed in each way.

    python benchmarks/healing.py models/reference SCRATCH_FOLDER --calibration NOVEL.txt --text BOOK.txt --other wiki.test.raw
        [--calibration-tokens 262144] [--lora-tokens 262144] [--amounts 1,4] [--criteria bi,greedy,healed] [--no-gptq]

Prints Markdown. "won" is the share of the log-perplexity lost by removal that came back; the last two columns judge the same
checkpoint after GPTQ at its defaults. Layers are chosen and GPTQ is calibrated on the shipped calibration text (layers on what the
model writes where that is ``--calibration self``); healing learns from ``--calibration``, and nothing sees ``--text`` or
``--other``. Each row is a checkpoint that the command line's own stages wrote; finished folders are kept, so an interrupted run
resumes (their CPU time is then unknown).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SELF, HealOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.text.windows import text_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text that healing learns from")
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--lora-tokens", type=int, default=262144)
    parser.add_argument("--text", type=Path, required=True, action="append", help="held-out text of the same kind")
    parser.add_argument("--other", type=Path, required=True, help="held-out text of another kind")
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--amounts", default="1,4")
    parser.add_argument("--criteria", default="bi,greedy,healed")
    parser.add_argument("--no-gptq", dest="gptq", action="store_false", help="leave out the last two columns")
    parser.add_argument("--methods", default="linear,lora,linear+lora")
    options = parser.parse_args()
    budget = options.text_tokens
    same_kind = [row for text in options.text for row in text_windows(text, options.model, budget=budget)]
    other = text_windows(options.other, options.model, budget=budget)
    whole = Blocks(load_model(options.model))
    base = judged(whole, whole, same_kind), judged(whole, whole, other)
    gptq = " GPTQ | its KL |" if options.gptq else ""
    print(f"| layers removed | by | healed | perplexity | won | KL | top-1 | other text | won | its KL | CPU seconds |{gptq}")
    print("| --- | --- | --- |" + " ---: |" * (8 + 2 * options.gptq))
    cells = ["none", "", "", f"{np.exp(base[0][0]):.2f}", "", "0", "100 %", f"{np.exp(base[1][0]):.1f}", "", "0", ""]
    row(cells, whole, Artifact.load(options.model), options.scratch / "whole-gptq", same_kind, options.gptq)
    for amount in map(int, options.amounts.split(",")):
        for criterion in options.criteria.split(","):
            rows(whole, options, amount, criterion, same_kind, other, (base[0][0], base[1][0]))


def rows(
    whole: Blocks,
    options: argparse.Namespace,
    amount: int,
    criterion: str,
    same_kind: list[np.ndarray],
    other: list[np.ndarray],
    base: tuple[float, float],
) -> None:
    folder = options.scratch / f"{criterion}-{amount}"
    text = SELF if options.calibration == SELF else CALIBRATION_TEXT
    choice = PruneOptions(criterion=criterion, remove_count=amount, calibration=text)
    pruned = stages.run("prune", Artifact.load(options.model), folder / "pruned", choice)
    lost: tuple[float, float] | None = None
    for method in ("", *options.methods.split(",")):
        artifact, seconds = pruned, ""
        if method:
            settings = HealOptions(
                healer=method, original=options.model, calibration=options.calibration,
                calibration_tokens=options.calibration_tokens, lora_tokens=options.lora_tokens,
            )  # fmt: skip
            kept, before = (folder / method).is_dir(), time.process_time()
            artifact = stages.run("heal", pruned, folder / method, settings)
            seconds = "" if kept else f"{time.process_time() - before:.0f}"
        blocks = Blocks(load_model(artifact.path))
        scores, other_scores = judged(whole, blocks, same_kind), judged(whole, blocks, other)
        lost = lost or (scores[0] - base[0], other_scores[0] - base[1])
        losses = zip((scores[0], other_scores[0]), base, lost, strict=True)
        won = [f"{100 * (1 - (now - whole_loss) / loss):.0f} %" for now, whole_loss, loss in losses]
        layers = ", ".join(map(str, pruned.steps[-1].facts["removed_layers"]))
        cells = [layers, criterion, method or "no", f"{np.exp(scores[0]):.2f}", won[0] if method else "", f"{scores[1]:.4f}"]
        cells += [
            f"{100 * scores[2]:.1f} %",
            f"{np.exp(other_scores[0]):.1f}",
            won[1] if method else "",
            f"{other_scores[1]:.4f}",
            seconds,
        ]
        row(cells, whole, artifact, folder / f"{method or 'pruned'}-gptq", same_kind, options.gptq)


def row(cells: list[str], whole: Blocks, source: Artifact, folder: Path, windows: list[np.ndarray], gptq: bool) -> None:
    """Print a row, with what is left after GPTQ at its defaults, its codes seen as floats."""
    if gptq:
        packed = judged(whole, Blocks(load_model(stages.run("quantize", source, folder, QuantizeOptions()).path)), windows)
        cells = [*cells, f"{np.exp(packed[0]):.2f}", f"{packed[1]:.4f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def judged(whole: Blocks, blocks: Blocks, windows: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean loss, KL from the whole model, and agreement of the likeliest token."""
    scores = Quality()
    for row in windows:
        scores.add(row, logits_of(blocks.model, row), logits_of(whole.model, row))
    return tuple(float(np.concatenate(part).mean()) for part in (scores.losses, scores.divergences, scores.agreements))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
