"""What each way of choosing layers costs: perplexity, KL and top-1 agreement on held-out text, for 1, 2 and 25 % of the layers.

    python benchmarks/layer_removal.py models/reference --calibration models/reference/calibration.txt --text BOOK.txt
    python benchmarks/layer_removal.py STORIES260K --calibration STORIES.txt --text STORIES.txt --text-skip 40000

Prints Markdown. The last column is the difference of greedy's KL from Block Influence's at the same count, token by token,
with its 95 % interval over windows; the text must not be the one that the layers are chosen on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune.criteria import choose
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.text.calibration import calibration
from edgepress.pipeline.text.windows import text_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text that layers are chosen on")
    parser.add_argument("--text", type=Path, required=True, action="append", help="held-out text, may be given several times")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens of each text (default: 8192)")
    parser.add_argument("--text-skip", type=int, default=0, help="tokens of each text to skip first")
    options = parser.parse_args()
    blocks = Blocks(load_model(options.model))
    windows = [
        row
        for text in options.text
        for row in text_windows(text, options.model, budget=options.text_tokens, skip=options.text_skip)
    ]
    whole = measured(blocks, [], windows)
    print(f"{options.model.name}: {len(blocks)} layers; {sum(len(w) - 1 for w in windows):,} tokens of held-out text\n")
    print("| removed | criterion | layers | perplexity | KL | top-1 | trials | greedy's KL less bi's |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| 0 | | | {np.exp(np.concatenate(whole[0]).mean()):.3f} | 0 | 100 % | | |")
    for amount in sorted({1, 2, len(blocks) // 4} - {0}):
        row_by_criterion(blocks, windows, amount, options)


def row_by_criterion(blocks: Blocks, windows: list[np.ndarray], amount: int, options: argparse.Namespace) -> None:
    scores = {}
    for name in ("bi", "angular", "greedy"):
        settings = PruneOptions(criterion=name, remove_count=amount, calibration=options.calibration)
        ranking, held_out = calibration(options.model, settings)
        influence = measure_influence(blocks, ranking, [amount])
        choice = choose(settings, amount, blocks, influence, ranking, held_out)
        losses, kl, same = scores[name] = measured(blocks, choice.removed, windows)
        difference = ""
        if name == "greedy":
            by_window = np.array([ours.mean() - bi.mean() for ours, bi in zip(kl, scores["bi"][1], strict=True)])
            half = 1.96 * by_window.std(ddof=1) / np.sqrt(len(by_window))
            difference = f"{by_window.mean():+.4f} ± {half:.4f}"
        cells = [str(amount), name, ", ".join(map(str, choice.removed)), f"{np.exp(np.concatenate(losses).mean()):.3f}"]
        cells += [
            f"{np.concatenate(kl).mean():.4f}",
            f"{100 * np.concatenate(same).mean():.1f} %",
            str(choice.evaluations),
            difference,
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def measured(blocks: Blocks, removed: list[int], windows: list[np.ndarray]) -> tuple[list[np.ndarray], ...]:
    """Losses, divergences from the whole model and agreements of the likeliest token, an array a window."""
    scored = []
    for row in windows:
        scores, original = Quality(), logits_of(blocks.model, row)
        with blocks.without(removed):
            scores.add(row, logits_of(blocks.model, row), original)
        scored.append([np.concatenate(part) for part in (scores.losses, scores.divergences, scores.agreements)])
    return tuple(list(part) for part in zip(*scored, strict=True))


if __name__ == "__main__":
    main()
