"""What healing could win back if time were no limit: layers chosen greedily, then every parameter distilled towards the model.

    python benchmarks/long_healing.py MODEL SCRATCH --text HELD_OUT --text HELD_OUT [--counts 3,6,9] [--own-tokens 1048576]
        [--tokens 4194304] [--rates 2e-4]

Learns from text that the model itself wrote (kept in SCRATCH); --text is judged only. Prints Markdown: perplexity and KL divergence
(nats a token) of each text, after removal and after distillation. Meant for a GPU; with small numbers it runs on any machine. It is
the yardstick of what ``edgepress heal`` leaves lying, not a way to ship.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.machine import training_device
from edgepress.pipeline.own_text import sampler
from edgepress.pipeline.progress import progress
from edgepress.pipeline.text.windows import IDS, read_ids, text_windows
from transformers import PreTrainedModel

WINDOW, CHOICE_TOKENS = 256, 8192
Texts = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--counts", default="3,6,9")
    parser.add_argument("--own-tokens", type=int, default=1 << 20)
    parser.add_argument("--tokens", type=int, default=1 << 22, help="to distil on, the text again and again")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--rates", default="2e-4")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(stages.source_of(options.model).path)
    device = training_device()
    own = written(checkpoint, options)
    whole = checkpoint.model().to(device)
    texts = {path.stem: judged_windows(path, checkpoint.path, options.text_tokens).to(device) for path in options.text}
    held, fit = own[: CHOICE_TOKENS // WINDOW].to(device), own[CHOICE_TOKENS // WINDOW :].to(device)
    columns = "".join(f" {name}: perplexity | KL |" for name in texts)
    print(f"| layers removed | distilled on | rate | seconds |{columns}")
    print("| --- | ---: | ---: | ---: |" + " ---: | ---: |" * len(texts))
    row(["none", "", "", ""], whole, whole, texts)
    pruned, gone = copy.deepcopy(whole), list[int]()
    for count in sorted(map(int, options.counts.split(","))):
        while len(gone) < count:
            gone.append(remove_least(pruned, whole, held, gone))
        removed = ", ".join(map(str, gone))
        row([removed, "", "", ""], pruned, whole, texts)
        for rate in map(float, options.rates.split(",")):
            student, begun = copy.deepcopy(pruned), time.monotonic()
            distil(student, whole, fit, options, rate)
            seconds = time.monotonic() - begun
            row([removed, str(options.tokens), f"{rate:g}", f"{seconds:.0f}"], student, whole, texts)


def written(checkpoint: Checkpoint, options: argparse.Namespace) -> torch.Tensor:
    """What the model wrote, int64 (windows, WINDOW)."""
    file = options.scratch / f"own-{options.own_tokens}{IDS}"
    if not file.is_file():
        np.savez(file, ids=sampler.sample(checkpoint, options.own_tokens, 0))
    ids = read_ids(file)
    return torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


def judged_windows(path: Path, folder: Path, tokens: int) -> torch.Tensor:
    rows = text_windows(path, folder, budget=tokens, length=WINDOW)
    return torch.from_numpy(np.stack([row for row in rows if len(row) == len(rows[0])]))


def remove_least(model: PreTrainedModel, whole: PreTrainedModel, held: torch.Tensor, gone: list[int]) -> int:
    """Take the block out without which the divergence on ``held`` is least; returns its number in the whole model."""
    parent, _, name = Blocks(model).name.rpartition(".")
    holder = model.get_submodule(parent)
    modules = list(getattr(holder, name))
    numbers = [number for number in range(len(modules) + len(gone)) if number not in gone]
    scores = []
    for index in progress(list(range(len(modules))), "which block", "block"):
        setattr(holder, name, torch.nn.ModuleList(modules[:index] + modules[index + 1 :]))
        scores.append(judge(model, whole, held)[1])
    least = int(np.argmin(scores))
    setattr(holder, name, torch.nn.ModuleList(modules[:least] + modules[least + 1 :]))
    return numbers[least]


def distil(student: PreTrainedModel, whole: PreTrainedModel, fit: torch.Tensor, options: argparse.Namespace, rate: float) -> None:
    """AdamW on every parameter, a short rise and half a cosine, matrices multiplied in bfloat16."""
    batch, steps = max(1, options.batch // WINDOW), math.ceil(options.tokens / options.batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.05 * steps + 1), 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for _ in progress(list(range(steps)), "distillation", "step"):
        while len(order) < batch:
            order += torch.randperm(len(fit), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        loss = divergence(student, whole, fit[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def divergence(student: PreTrainedModel, whole: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """KL(whole || student) in nats, (windows, positions)."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        with torch.no_grad():
            reference = torch.log_softmax(whole(input_ids=ids, use_cache=False).logits.float(), -1)
        scores = torch.log_softmax(student(input_ids=ids, use_cache=False).logits.float(), -1)
    return torch.nn.functional.kl_div(scores, reference, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def judge(model: PreTrainedModel, whole: PreTrainedModel, windows: torch.Tensor) -> tuple[float, float]:
    """Perplexity and KL divergence from the whole model."""
    losses, divergences = [], []
    for ids in windows.split(16):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"))
        reference = torch.log_softmax(whole(input_ids=ids, use_cache=False).logits.float(), -1)
        divergences.append(
            torch.nn.functional.kl_div(torch.log_softmax(logits, -1), reference, reduction="none", log_target=True).sum(-1)
        )
    return math.exp(float(torch.cat(losses).mean())), float(torch.cat(divergences).mean())


def row(cells: list[str], model: PreTrainedModel, whole: PreTrainedModel, texts: Texts) -> None:
    for windows in texts.values():
        perplexity, divergent = judge(model, whole, windows)
        cells += [f"{perplexity:.2f}", f"{divergent:.4f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
