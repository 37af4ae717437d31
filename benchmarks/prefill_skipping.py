"""Layers skipped while the prompt is read and run while tokens are generated: what that saves of the harm, on a Llama in torch.

    python benchmarks/prefill_skipping.py models/reference BOOK.txt [--prompt 128 --continuation 128 --layers 2,4,10,14]

Prints the perplexity of a continuation after a prompt, KL and top-1 agreement with the whole model, when the layers are
(a) run, (b) removed, (c) skipped for the prompt alone; and the time to read the prompt with and without them, interleaved.
In (c) a skipped layer has no keys of the prompt: while generating it sees only what was generated, which is what an
engine with a cache computes. The whole sequence is run at once with a mask that says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import divergences
from edgepress.pipeline.text.windows import text_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--layers", default="2,4,10,14")
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    removed = [int(index) for index in options.layers.split(",")]
    blocks = Blocks(load_model(options.model))
    blocks.model.set_attn_implementation("eager")  # masks reach the blocks as tensors
    length = options.prompt + options.continuation
    windows = [
        row
        for text in options.text
        for row in text_windows(text, options.model, budget=length * options.windows, length=length, shortest=length)
    ]
    scores: dict[str, list[np.ndarray]] = {"run": [], "removed": [], "skipped for the prompt": []}
    for row in windows:
        ids = torch.from_numpy(row)[None]
        logits = {"run": blocks.logits(ids)}
        with blocks.without(removed):
            logits["removed"] = blocks.logits(ids)
        with skipped_for_prompt(blocks, removed, options.prompt):
            logits["skipped for the prompt"] = blocks.logits(ids)
        for name, values in logits.items():
            scores[name].append(
                scored(values[0, options.prompt - 1 : -1], logits["run"][0, options.prompt - 1 : -1], ids[0, options.prompt :])
            )
    shape = f"{len(windows)} windows, prompt {options.prompt}, continuation {options.continuation}"
    print(f"layers {options.layers} of {len(blocks)}; {shape}\n")
    print("| layers are | perplexity of the continuation | KL | top-1 |\n| --- | ---: | ---: | ---: |")
    for name, rows in scores.items():
        losses, kl, same = np.concatenate(rows, axis=1)
        print(f"| {name} | {np.exp(losses.mean()):.2f} | {abs(kl.mean()):.4f} | {100 * same.mean():.1f} % |")
    print(f"\ntime to read the prompt without the layers / with them: {prompt_time(blocks, windows[0][: options.prompt], removed)}")


def scored(logits: torch.Tensor, original: torch.Tensor, following: torch.Tensor) -> np.ndarray:
    """Loss, divergence and agreement of each position, (3, positions)."""
    losses = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    same = (logits.argmax(-1) == original.argmax(-1)).float()
    return torch.stack([losses, divergences(original, logits), same]).double().numpy()


@contextmanager
def skipped_for_prompt(blocks: Blocks, removed: list[int], prompt: int) -> Iterator[None]:
    """Within the context the blocks leave the first ``prompt`` positions as they are and do not see them."""

    def blind(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"].clone()
        mask[..., prompt:, :prompt] = torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    def restore(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return torch.cat([args[0][:, :prompt], output[:, prompt:]], dim=1)

    handles = [blocks.modules[index].register_forward_pre_hook(blind, with_kwargs=True) for index in removed]
    handles += [blocks.modules[index].register_forward_hook(restore, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt_time(blocks: Blocks, prompt: np.ndarray, removed: list[int]) -> str:
    ids, ratios = torch.from_numpy(prompt)[None], []
    for _ in range(12):
        begun = time.perf_counter()
        blocks.logits(ids)
        between = time.perf_counter()
        with blocks.without(removed):
            blocks.logits(ids)
        ratios.append((time.perf_counter() - between) / (between - begun))
    return f"{np.median(ratios[2:]):.3f} (from {min(ratios[2:]):.3f} to {max(ratios[2:]):.3f})"


if __name__ == "__main__":
    main()
