"""Depth, parts of blocks, width and bits beside each other: one model without some of it, each as the stages leave it.

    python benchmarks/pruning_axes.py MODEL SCRATCH --text TEXT --text TEXT --row width=0.1 --row width=0.1,plain --row depth=3
    python benchmarks/pruning_axes.py MODEL SCRATCH --text TEXT --ship --row depth=2 --row attention=8 --row feed-forward=3

A row is width=SHARE (``narrow --remove-channels``), depth=COUNT (``prune --remove-count``, then ``heal``), attention=COUNT or
feed-forward=COUNT (``prune --parts``, then ``heal``); ``plain``: neither refitted nor healed. Prints Markdown: parameters that are
left, perplexity and KL divergence (nats a token, float32) of each text, and seconds of the stages by the clock. Stages calibrate on
the model's own text; finished folders in SCRATCH are kept.

``--ship``: each row is then quantized by GPTQ at 4 bits and exported, below SCRATCH/shipped, and followed by the whole model in as
many bytes (``quantize --max-size``): fewer bits in place of removal.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import parameters_left
from edgepress.pipeline.files import folder_bytes
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SELF, ExportOptions, HealOptions, NarrowOptions, Options, PruneOptions, QuantizeOptions
from edgepress.pipeline.text.windows import text_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=Path, default=SELF)
    parser.add_argument("--greedy-tokens", type=int, default=PruneOptions.greedy_tokens)
    parser.add_argument("--row", action="append", required=True)
    parser.add_argument("--ship", action="store_true", help="quantize and export each row, and the whole model in as many bytes")
    options = parser.parse_args()
    source = stages.source_of(options.model)
    checkpoint = Checkpoint(source.path)
    texts = {path.stem: text_windows(path, source.path, budget=options.text_tokens, length=512) for path in options.text}
    model = checkpoint.model()
    truth = {name: [logits_of(model, ids) for ids in windows] for name, windows in texts.items()}
    whole = model.num_parameters()
    print(
        "| removed | parameters |"
        + " MB |" * options.ship
        + "".join(f" {name}: perplexity | KL |" for name in texts)
        + " seconds |"
    )
    print("| --- | ---: |" + " ---: |" * options.ship + " ---: | ---: |" * len(texts) + " ---: |")
    del model
    for spec in ["none", *options.row]:
        begun = time.monotonic()
        artifact = source if spec == "none" else made(source, spec, options)
        rows = shipped(source, artifact, spec, options) if options.ship else {spec: (artifact, 0)}
        seconds = time.monotonic() - begun
        for name, (folder, size) in rows.items():
            one = Checkpoint(folder.path)
            model = one.model()
            cells = [name, f"{100 * parameters_left(model, one.silent) / whole:.1f} %", *([f"{size / 1e6:.1f}"] if size else [])]
            for text, windows in texts.items():
                scores = Quality()
                for ids, logits in zip(windows, truth[text], strict=True):
                    scores.add(ids, logits_of(model, ids), logits)
                cells.append(f"{np.exp(np.concatenate(scores.losses).mean()):.2f}")
                cells.append(f"{np.concatenate(scores.divergences).mean():.4f}")
            print("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |", flush=True)


def shipped(source: Artifact, pruned: Artifact, spec: str, options: argparse.Namespace) -> dict[str, tuple[Artifact, int]]:
    """The row at 4 bits, and the whole model in as many bytes: quantized folders, and the bytes of their artifacts."""
    folder = options.scratch / "shipped" / spec.replace("=", "-").replace(",", "-")
    usual = QuantizeOptions(group_size=64, calibration=options.calibration)
    found = {f"{spec}, 4 bits": artifact_of(pruned, usual, folder)}
    size = found[f"{spec}, 4 bits"][1]
    if spec != "none":
        fitting = QuantizeOptions(max_size=f"{size / 1e6}MB", calibration=options.calibration)
        found[f"none, in {size / 1e6:.1f} MB"] = artifact_of(source, fitting, folder / "whole")
    return found


def artifact_of(source: Artifact, options: QuantizeOptions, folder: Path) -> tuple[Artifact, int]:
    """The quantized checkpoint, and the bytes of what export makes of it."""
    packed = stages.run("quantize", source, folder / "packed", options)
    return packed, folder_bytes(stages.run("export", packed, folder / "onnx", ExportOptions()).path)


def made(source: Artifact, spec: str, options: argparse.Namespace) -> Artifact:
    """The folder of a row, built if it is not there."""
    (axis, amount), plain = spec.partition(",")[0].split("=", 1), spec.endswith(",plain")
    out = options.scratch / spec.replace("=", "-").replace(",", "-")
    chosen: Options
    if axis == "width":
        chosen = NarrowOptions(remove_channels=float(amount), refit=not plain, calibration=options.calibration)
        return stages.run("narrow", source, out, chosen)
    parts = "blocks" if axis == "depth" else axis
    removing = PruneOptions(
        parts=parts, remove_count=int(amount), calibration=options.calibration, shortlist=8, greedy_tokens=options.greedy_tokens
    )  # fmt: skip
    pruned = stages.run("prune", source, options.scratch / f"{axis}-{amount}-plain", removing)
    if plain:
        return pruned
    return stages.run("heal", pruned, out, HealOptions(original=source.path, calibration=options.calibration))


if __name__ == "__main__":
    main()
