"""Depth beside width: one model without some layers, or without some feed-forward channels, each as the stages leave it.

    python benchmarks/pruning_axes.py MODEL SCRATCH --text TEXT --text TEXT --row width=0.1 --row width=0.1,plain --row depth=3

A row is width=SHARE (``narrow --remove-channels``) or depth=COUNT (``prune --remove-count``, then ``heal``); ``plain``: neither
refitted nor healed. Prints Markdown: parameters that are left, perplexity and KL divergence (nats a token, float32) of each text,
and seconds of the stages by the clock. Stages calibrate on the model's own text; finished folders in SCRATCH are kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SELF, HealOptions, NarrowOptions, Options, PruneOptions
from edgepress.pipeline.text.windows import text_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=Path, default=SELF)
    parser.add_argument("--row", action="append", required=True)
    options = parser.parse_args()
    source = stages.source_of(options.model)
    checkpoint = Checkpoint(source.path)
    texts = {path.stem: text_windows(path, source.path, budget=options.text_tokens, length=512) for path in options.text}
    model = checkpoint.model()
    truth = {name: [logits_of(model, ids) for ids in windows] for name, windows in texts.items()}
    whole = model.num_parameters()
    print("| removed | parameters |" + "".join(f" {name}: perplexity | KL |" for name in texts) + " seconds |")
    print("| --- | ---: |" + " ---: | ---: |" * len(texts) + " ---: |")
    del model
    for spec in ["none", *options.row]:
        begun = time.monotonic()
        artifact = source if spec == "none" else made(source, spec, options)
        seconds = time.monotonic() - begun
        model = Checkpoint(artifact.path).model()
        cells = [spec, f"{100 * model.num_parameters() / whole:.1f} %"]
        for name, windows in texts.items():
            scores = Quality()
            for ids, logits in zip(windows, truth[name], strict=True):
                scores.add(ids, logits_of(model, ids), logits)
            cells += [f"{np.exp(np.concatenate(scores.losses).mean()):.2f}", f"{np.concatenate(scores.divergences).mean():.4f}"]
        print("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |", flush=True)


def made(source: Artifact, spec: str, options: argparse.Namespace) -> Artifact:
    """The folder of a row, built if it is not there."""
    (axis, amount), plain = spec.partition(",")[0].split("=", 1), spec.endswith(",plain")
    out = options.scratch / spec.replace("=", "-").replace(",", "-")
    chosen: Options
    if axis == "width":
        chosen = NarrowOptions(remove_channels=float(amount), refit=not plain, calibration=options.calibration)
        return stages.run("narrow", source, out, chosen)
    removing = PruneOptions(remove_count=int(amount), calibration=options.calibration, shortlist=8)
    pruned = stages.run("prune", source, options.scratch / f"depth-{amount}-plain", removing)
    if plain:
        return pruned
    return stages.run("heal", pruned, out, HealOptions(original=source.path, calibration=options.calibration))


if __name__ == "__main__":
    main()
