"""Measuring Block Influence against a plain forward pass over the same tokens, in one run, interleaved: the ratio of their times.

    python benchmarks/influence_cost.py [--hidden 896 --layers 24 ...]

The default is a random model of Qwen2.5-0.5B's shape with a small vocabulary, which makes the ratio no smaller.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.prune.influence import measure_influence
from transformers import AutoModelForCausalLM, Qwen2Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, value in (("hidden", 896), ("intermediate", 4864), ("layers", 24), ("heads", 14), ("vocabulary", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=max(1, options.heads // 7),
    )  # fmt: skip
    blocks = Blocks(AutoModelForCausalLM.from_config(config).float().eval())
    rng = np.random.default_rng(0)
    windows = [rng.integers(0, options.vocabulary, options.length) for _ in range(options.windows)]

    def plain() -> None:
        for ids, _ in batches(blocks.model, windows):
            blocks.logits(ids)

    def measured() -> None:
        measure_influence(blocks, windows)

    plain()
    ratios = []
    for _ in range(options.repeats):
        seconds = []
        for work in (plain, measured, measured, plain):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        ratios.append((seconds[1] + seconds[2]) / (seconds[0] + seconds[3]))
    print(f"plain forward {seconds[0]:.2f} s for {options.windows * options.length} tokens, {torch.get_num_threads()} threads")
    print(f"Block Influence / plain forward: median {np.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
