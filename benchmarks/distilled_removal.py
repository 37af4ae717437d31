"""What distillation wins back after layers were removed: what is trained, on which text, how long.

    python benchmarks/distilled_removal.py MODEL SCRATCH --text HELD_OUT --text HELD_OUT --remove 3 all:self:1048576:2e-4
        lora:novel.txt:1048576:1e-3 --remove 14,15,17 all:self:1048576:2e-4 [--tasks FOLDER]

``--remove`` is a number of layers, chosen one by one by what they add to the KL divergence on the model's own text, or a list of
them; what follows is WHAT:TEXT:TOKENS:RATE. WHAT is ``all`` parameters, ``lora`` (rank 16, every matrix of the blocks), ``scales``
(a number for each output of those matrices, and the norms) or ``cap`` (all, and the contrastive term of Xu et al. 2022 at weight
1); TEXT is ``self``, what the model itself writes (kept in SCRATCH), or files joined by ``+``. ``--text`` is judged only. Prints
Markdown: perplexity and KL divergence (nats a token) of each text, and with ``--tasks`` (a folder with the JSON Lines files of
SciQ, ARC-Easy, PIQA, OpenBookQA and LAMBADA) the share of right answers, scored as lm-evaluation-harness does without examples.
Meant for a GPU; with small numbers it runs on any machine. It is the yardstick of what ``edgepress heal`` leaves lying, not a
way to ship.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, block_output, decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.heal.distillation import contrast
from edgepress.pipeline.machine import training_device
from edgepress.pipeline.own_text import sampler
from edgepress.pipeline.progress import progress
from edgepress.pipeline.text.windows import IDS, load_tokenizer, read_ids, text_windows
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

WINDOW, CHOICE_TOKENS = 256, 8192
Texts = dict[str, torch.Tensor]
# One question: the ids of its context and of every answer, and which is right (None: the answer must be the likeliest text).
Question = tuple[list[int], list[list[int]], int | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--remove", action="append", nargs="+", required=True, metavar="LAYERS ROW")
    parser.add_argument("--own-tokens", type=int, default=1 << 20)
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--task-limit", type=int, default=500)
    options = parser.parse_args()
    if options.own_tokens < CHOICE_TOKENS + WINDOW or options.batch < WINDOW:
        parser.error(f"--own-tokens must be at least {CHOICE_TOKENS + WINDOW}, and --batch {WINDOW}")
    options.scratch.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    checkpoint, device = Checkpoint(stages.source_of(options.model).path), training_device()
    own = written(checkpoint, options)
    whole = checkpoint.model().to(device)
    texts = {path.stem: windows(path, checkpoint.path, options.text_tokens).to(device) for path in options.text}
    tasks = questions(options.tasks, checkpoint.path, options.task_limit) if options.tasks else {}
    held, own = own[: CHOICE_TOKENS // WINDOW].to(device), own[CHOICE_TOKENS // WINDOW :]
    columns = [f"{name}: perplexity | KL" for name in texts] + list(tasks)
    print("| layers removed | trained | on | tokens | rate | seconds | " + " | ".join(columns) + " |")
    print("| --- | --- | --- | ---: | ---: | ---: |" + " ---: |" * (2 * len(texts) + len(tasks)))
    show(["none", "", "", "", "", ""], whole, whole, texts, tasks)
    for wish, *wanted in options.remove:
        pruned, removed = without(whole, held, wish)
        show([removed, "", "", "", "", ""], pruned, whole, texts, tasks)
        for row in wanted:
            what, text, tokens, rate = row.split(":")
            fit = own if text == "self" else joined(text, checkpoint.path)
            student, begun = copy.deepcopy(pruned), time.monotonic()
            student = distil(student, pruned, whole, fit.to(device), what, int(tokens), float(rate), options.batch // WINDOW)
            seconds = time.monotonic() - begun
            show([removed, what, text, tokens, rate, f"{seconds:.0f}"], student, whole, texts, tasks)


def written(checkpoint: Checkpoint, options: argparse.Namespace) -> torch.Tensor:
    """What the model wrote, int64 (windows, WINDOW)."""
    file = options.scratch / f"own-{options.own_tokens}{IDS}"
    if not file.is_file():
        np.savez(file, ids=sampler.sample(checkpoint, options.own_tokens, 0))
    ids = read_ids(file)
    return torch.from_numpy(ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW))


def joined(files: str, folder: Path) -> torch.Tensor:
    return torch.cat([windows(Path(file), folder, 1 << 20) for file in files.split("+")])


def windows(path: Path, folder: Path, tokens: int) -> torch.Tensor:
    rows = text_windows(path, folder, budget=tokens, length=WINDOW)
    return torch.from_numpy(np.stack([row for row in rows if len(row) == len(rows[0])]))


def without(whole: PreTrainedModel, held: torch.Tensor, wish: str) -> tuple[PreTrainedModel, str]:
    """A copy without the layers of a list, or without as many as a number says, each the one that adds least divergence."""
    model, numbers = copy.deepcopy(whole), list(range(len(decoder_blocks(whole)[1])))
    listed = sorted(map(int, wish.split(",")), reverse=True) if "," in wish else None
    gone = list[int]()
    for _ in progress(list(range(len(listed) if listed else int(wish))), "removal", "layer"):
        parent, _, name = decoder_blocks(model)[0].rpartition(".")
        holder = model.get_submodule(parent)
        modules = list(getattr(holder, name))
        if listed:
            index = listed.pop(0)
        else:
            scores = []
            for trial in range(len(modules)):
                setattr(holder, name, torch.nn.ModuleList(modules[:trial] + modules[trial + 1 :]))
                with torch.autocast(held.device.type, dtype=torch.bfloat16):
                    scores.append(judge(model, whole, held)[1])
            index = int(np.argmin(scores))
        setattr(holder, name, torch.nn.ModuleList(modules[:index] + modules[index + 1 :]))
        model.config.num_hidden_layers = len(modules) - 1
        gone.append(numbers.pop(index))
    return model, ", ".join(map(str, sorted(gone)))


def distil(
    student: PreTrainedModel, snapshot: PreTrainedModel, whole: PreTrainedModel, fit: torch.Tensor, what: str, tokens: int,
    rate: float, batch: int,
) -> PreTrainedModel:  # fmt: skip
    """AdamW, a short rise and half a cosine, matrices multiplied in bfloat16; returns the student without what was added to it."""
    trained, finish = trainable(student, what)
    steps = math.ceil(tokens / (batch * WINDOW))
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.05 * steps + 1), 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    generator, order = torch.Generator().manual_seed(0), list[int]()
    seen = [leaving(model) for model in (student, snapshot, whole)] if what == "cap" else []
    for _ in progress(list(range(steps)), "distillation", "step"):
        while len(order) < batch:
            order += torch.randperm(len(fit), generator=generator).tolist()
        chosen, order = fit[order[:batch]], order[batch:]
        loss = divergence(student, whole, chosen).mean()
        if seen:
            with torch.no_grad(), torch.autocast(chosen.device.type, dtype=torch.bfloat16):
                snapshot(input_ids=chosen, use_cache=False)
            mine, *others = (states.pop().float().mean(1) for states, _ in seen)
            loss = loss + contrast(mine, others)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    for _, handle in seen:
        handle.remove()
    return finish()


def leaving(model: PreTrainedModel) -> tuple[list[torch.Tensor], RemovableHandle]:
    """What left the last block in the last run, (windows, positions, hidden), in a list; and what ends that."""
    states: list[torch.Tensor] = []

    def see(_module: torch.nn.Module, _args: BlockArgs, output: BlockOutput) -> None:
        states[:] = [block_output(output)]

    return states, decoder_blocks(model)[1][-1].register_forward_hook(see)


def trainable(student: PreTrainedModel, what: str):  # type: ignore[no-untyped-def]
    """The parameters to train, and what gives the model when that is done."""
    if what in ("all", "cap"):
        return list(student.parameters()), lambda: student
    holder, blocks = decoder_blocks(student)
    names = [
        f"{holder}.{index}.{name}"
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=names))
        return [p for p in adapted.parameters() if p.requires_grad], adapted.merge_and_unload
    student.requires_grad_(False)
    scales = []
    for name in names:
        module = student.get_submodule(name)
        scale = torch.nn.Parameter(torch.ones(module.out_features, device=module.weight.device))
        module.register_forward_hook(lambda _module, _args, output, scale=scale: output * scale)
        scales.append(scale)
    norms = [p.requires_grad_(True) for name, p in student.named_parameters() if p.dim() == 1]
    return scales + norms, lambda: student


def divergence(student: PreTrainedModel, whole: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """KL(whole || student) in nats, (windows, positions)."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        with torch.no_grad():
            reference = torch.log_softmax(whole(input_ids=ids, use_cache=False).logits.float(), -1)
        scores = torch.log_softmax(student(input_ids=ids, use_cache=False).logits.float(), -1)
    return torch.nn.functional.kl_div(scores, reference, reduction="none", log_target=True).sum(-1)


@torch.no_grad()
def judge(model: PreTrainedModel, whole: PreTrainedModel, ids: torch.Tensor) -> tuple[float, float]:
    """Perplexity and KL divergence from the whole model."""
    losses, divergences = [], []
    for part in ids.split(16):
        logits = model(input_ids=part, use_cache=False).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none"))
        reference = torch.log_softmax(whole(input_ids=part, use_cache=False).logits.float(), -1)
        divergences.append(
            torch.nn.functional.kl_div(torch.log_softmax(logits, -1), reference, reduction="none", log_target=True).sum(-1)
        )
    return math.exp(float(torch.cat(losses).mean())), float(torch.cat(divergences).mean())


def questions(folder: Path, model: Path, limit: int) -> dict[str, list[Question]]:
    """The first ``limit`` documents of each task."""
    tokenizer = load_tokenizer(model)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def question(context: str, answers: list[str], right: int | None) -> Question:
        begin = ids(context)
        return begin, [ids(f"{context} {answer}")[len(begin) :] for answer in answers], right

    def rows(pattern: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in next(folder.rglob(pattern)).read_text("utf-8").splitlines()[:limit]]

    tasks: dict[str, list[Question]] = {"SciQ": [], "ARC-Easy": [], "PIQA": [], "OpenBookQA": [], "LAMBADA": []}
    for row in rows("sciq*.jsonl"):
        answers = [row[key] for key in ("correct_answer", "distractor1", "distractor2", "distractor3")]
        tasks["SciQ"].append(question(f"{row['support']}\nQuestion: {row['question']}\nAnswer:".lstrip(), answers, 0))
    for name, pattern, form in (
        ("ARC-Easy", "*ARC-Easy*.jsonl", "Question: {question}\nAnswer:"), ("OpenBookQA", "openbookqa*.jsonl", "{question_stem}"),
    ):  # fmt: skip
        for row in rows(pattern):
            right = row["choices"]["label"].index(row["answerKey"])
            tasks[name].append(question(form.format(**row), row["choices"]["text"], right))
    for row in rows("piqa*.jsonl"):
        tasks["PIQA"].append(question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])))
    for row in rows("lambada*.jsonl"):
        context, _, word = row["text"].rpartition(" ")
        tasks["LAMBADA"].append(question(context, [word], None))
    return tasks


@torch.no_grad()
def right_answers(model: PreTrainedModel, asked: list[Question]) -> float:
    """The share that is answered right: the likeliest answer, or where there is one only, whether every token of it is."""
    rows = [(number, context + answer, len(answer)) for number, (context, answers, _) in enumerate(asked) for answer in answers]
    scores: list[list[tuple[float, bool]]] = [[] for _ in asked]
    for begin in range(0, len(rows), 64):
        part = rows[begin : begin + 64]
        ids = torch.zeros(len(part), max(len(row) for _, row, _ in part), dtype=torch.long)
        for place, (_, row, _) in enumerate(part):
            ids[place, : len(row)] = torch.tensor(row)
        ids = ids.to(next(model.parameters()).device)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        for place, (number, row, count) in enumerate(part):
            span = torch.log_softmax(logits[place, len(row) - count - 1 : len(row) - 1].float(), -1)
            target = ids[place, len(row) - count : len(row), None]
            scores[number].append((float(span.gather(-1, target).sum()), bool((span.argmax(-1) == target[:, 0]).all())))
    hits = [
        found[0][1] if right is None else int(np.argmax([score for score, _ in found])) == right
        for found, (_, _, right) in zip(scores, asked, strict=True)
    ]
    return sum(hits) / len(hits)


def show(cells: list[str], model: PreTrainedModel, whole: PreTrainedModel, texts: Texts, tasks: dict[str, list[Question]]) -> None:
    for ids in texts.values():
        perplexity, divergent = judge(model, whole, ids)
        cells += [f"{perplexity:.2f}", f"{divergent:.4f}"]
    cells += [f"{100 * right_answers(model, asked):.1f} %" for asked in tasks.values()]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
