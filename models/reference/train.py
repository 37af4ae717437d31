"""Train the reference model from a folder of text files, reproducibly, on CPU or CUDA.

    python models/reference/train.py TEXT_FOLDER OUT [--tokens 12000000] [--device auto]

One command does it all and may be interrupted: the same command again goes on from the last checkpoint.
OUT receives

    tokenizer/        byte-level BPE, trained on the training books
    tokens/*.npy      one uint16 array a book
    checkpoint.pt     weights, optimizer states and step (rewritten every few minutes)
    log.jsonl         one line a report: step, tokens, loss, learning rate, seconds
    checkpoint/       the finished Hugging Face checkpoint in bfloat16, with training.json and loss.png

Whole books are held out, so no sentence of the evaluation shares a book with the training text.
Matrices inside the blocks are trained with Muon (Jordan et al. 2024, scaled as in Liu et al. 2025, section 2.2),
embeddings and norms with AdamW; both follow one cosine schedule with linear warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

HELD_OUT = ("ENG18570_Bronte", "ENG18610_Eliot", "ENG18860_Hardy", "ENG18952_Wells", "ENG19080_Chesterton")
BOS = "<|endoftext|>"
CONTEXT = 512


def train_tokenizer(books: list[Path], folder: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocabulary`` entries; every encoded text begins with ``BOS``."""
    if not (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train([str(book) for book in books], trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT)
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(book: Path, tokenizer: PreTrainedTokenizerFast, folder: Path) -> np.ndarray:
    """Token ids of one book as uint16, without BOS, cached in ``folder``."""
    cached = folder / f"{book.stem}.npy"
    if not cached.is_file():
        ids = tokenizer(book.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        folder.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".partial.npy")
        np.save(partial, np.asarray(ids, dtype=np.uint16))
        partial.rename(cached)
    tokens: np.ndarray = np.load(cached)
    return tokens


def windows(tokens: np.ndarray, bos: int, length: int = CONTEXT) -> np.ndarray:
    """``tokens`` cut into rows of ``length``, each beginning with ``bos``; the incomplete last row is dropped."""
    body = length - 1
    rows = tokens[: len(tokens) // body * body].reshape(-1, body)
    return np.concatenate([np.full((len(rows), 1), bos, dtype=rows.dtype), rows], axis=1)


def batches(tokens: np.ndarray, bos: int, batch: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """Endless batches of int64 ids (batch, CONTEXT) from step ``start`` on.

    Each epoch cuts the text at another offset and shuffles the rows; both follow from seed and epoch alone,
    so an interrupted run sees the same batches as one that was not.
    """
    step = epoch = 0
    while True:
        random = np.random.default_rng([seed, epoch])
        rows = windows(tokens[random.integers(0, CONTEXT) :], bos)
        random.shuffle(rows)
        for first in range(0, len(rows) - batch + 1, batch):
            if step >= start:
                yield torch.from_numpy(rows[first : first + batch].astype(np.int64))
            step += 1
        epoch += 1


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of every token after the first, as float32 of shape (rows * (length - 1),)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


@torch.inference_mode()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: np.ndarray, device: str, batch: int = 16
) -> float:
    """Bits per UTF-8 byte of the text in ``rows`` (count, CONTEXT), BOS not scored."""
    model.eval()
    nats = 0.0
    for first in range(0, len(rows), batch):
        ids = torch.from_numpy(rows[first : first + batch].astype(np.int64)).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            nats += float(token_losses(model, ids).double().sum())
    model.train()
    # ByteLevel maps every byte to one character, so the token strings count bytes exactly, also across split characters.
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == BOS else len(token)
    return nats / math.log(2) / int(lengths[rows].sum())


def new_model(vocabulary: int, layers: int, bos: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos,
    )
    model = LlamaForCausalLM(config)
    # Each block adds two terms to the residual stream: scaled down or depth would grow it (GPT-2, section 2.3).
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * layers))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("text", type=Path, help="folder of UTF-8 .txt files, one book each")
    parser.add_argument("out", type=Path, help="working folder; the finished model is OUT/checkpoint")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training tokens in all")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=5120)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="windows at a time; gradients are summed over a step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler on CPU")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warm-up", type=int, default=60, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT), help="names of the books never trained on")
    parser.add_argument("--stop-after", type=int, help="stop after this many steps (a trial; the schedule is unchanged)")
    options = parser.parse_args()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    train(options, device)


def train(options: argparse.Namespace, device: str) -> None:
    books = sorted(options.text.glob("*.txt"))
    missing = set(options.held_out) - {book.stem for book in books}
    if missing:
        raise SystemExit(f"error: no such book in {options.text}: {', '.join(sorted(missing))}; name others with --held-out")
    training = [book for book in books if book.stem not in options.held_out]
    _same_run(options, training)
    tokenizer = train_tokenizer(training, options.out / "tokenizer", options.vocabulary)
    bos = tokenizer.bos_token_id
    tokens = np.concatenate([encode(book, tokenizer, options.out / "tokens") for book in training])
    held_out = {
        name: windows(encode(options.text / f"{name}.txt", tokenizer, options.out / "tokens"), bos) for name in options.held_out
    }
    quick = np.concatenate([rows[:8] for rows in held_out.values()])

    torch.manual_seed(options.seed)
    model = new_model(len(tokenizer), options.layers, bos).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=options.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    steps = math.ceil(options.tokens / (options.batch * CONTEXT))
    schedules = [get_cosine_schedule_with_warmup(o, options.warm_up, steps) for o in optimizers]
    saved = options.out / "checkpoint.pt"
    done, seconds = 0, 0.0
    if saved.is_file():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for target, value in zip(optimizers + schedules, state["optimizers"], strict=True):
            target.load_state_dict(value)
        done, seconds = state["step"], state["seconds"]
        log = options.out / "log.jsonl"  # what was reported after the checkpoint is done, and reported, again
        rows = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(row for row in rows if json.loads(row)["step"] <= done))
        print(f"going on from step {done} of {steps}", flush=True)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "step": step, "seconds": seconds}
        state["optimizers"] = [part.state_dict() for part in optimizers + schedules]
        torch.save(state, saved.with_suffix(".partial"))
        saved.with_suffix(".partial").replace(saved)

    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens in {len(training)} books, "
        f"{steps} steps of {options.batch * CONTEXT} tokens on {device}",
        flush=True,
    )
    # Compiled training is 1.5 times as fast on CPU; evaluation keeps the plain function, its shapes vary.
    losses_of = torch.compile(token_losses) if options.compile else token_losses
    step, losses, tick, last_save = done, [], time.monotonic(), time.monotonic()
    try:
        for ids in batches(tokens, bos, options.batch, options.seed, done):
            if step >= min(steps, options.stop_after or steps):
                break
            loss = 0.0
            for part in ids.to(device).split(options.micro_batch):
                with torch.autocast(device, dtype=torch.bfloat16):
                    share = losses_of(model, part).sum() / (len(ids) * (CONTEXT - 1))
                share.backward()
                loss += float(share.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in optimizers:
                part.step()
            for schedule in schedules:
                schedule.step()
            model.zero_grad(set_to_none=True)
            step += 1
            losses.append(loss)
            if step % 10 == 0 or step == steps:
                now = time.monotonic()
                seconds, tick = seconds + now - tick, now
                row = {
                    "step": step,
                    "tokens": step * options.batch * CONTEXT,
                    "loss": round(sum(losses) / len(losses), 4),
                    "learning_rate": schedules[0].get_last_lr()[0],
                    "seconds": round(seconds, 1),
                }
                losses = []
                if step % 100 == 0 or step == steps:
                    row["held_out_bits_per_byte"] = round(bits_per_byte(model, tokenizer, quick, device), 4)
                with (options.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                left = (steps - step) * seconds / step
                print(f"{row}  {row['tokens'] / seconds:.0f} tokens/s, {left / 60:.0f} min left", flush=True)
                if now - last_save > 180:
                    save(step)
                    last_save = now
    except KeyboardInterrupt:
        save(step)
        raise SystemExit(f"interrupted at step {step}; the same command goes on from there") from None
    save(step)
    if step >= steps:
        finish(model, tokenizer, held_out, options, step, seconds, device)


def _same_run(options: argparse.Namespace, training: list[Path]) -> None:
    """Refuse to go on in OUT with other books or settings: its tokenizer and weights would have seen what is held out now."""
    file = options.out / "run.json"
    wanted = {"books": [book.stem for book in training], "held_out": sorted(options.held_out)}
    wanted |= {name: getattr(options, name) for name in ("seed", "layers", "vocabulary", "batch", "learning_rate", "warm_up")}
    if file.is_file() and json.loads(file.read_text()) != wanted:
        raise SystemExit(f"error: {options.out} holds a run with other books or settings ({file}); give another OUT")
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n")


def finish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: dict[str, np.ndarray],
    options: argparse.Namespace,
    step: int,
    seconds: float,
    device: str,
) -> None:
    """Write OUT/checkpoint: bfloat16 weights, tokenizer, loss curve, and what was reached on each held-out book."""
    folder = options.out / "checkpoint"
    model = model.to(torch.bfloat16)
    scores = {name: round(bits_per_byte(model, tokenizer, rows, device), 4) for name, rows in held_out.items()}
    scores["all"] = round(bits_per_byte(model, tokenizer, np.concatenate(list(held_out.values())), device), 4)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "seed": options.seed,
        "steps": step,
        "tokens_seen": step * options.batch * CONTEXT,
        "hours": round(seconds / 3600, 2),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "learning_rate": options.learning_rate,
        "held_out_bits_per_byte": scores,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    draw(options.out / "log.jsonl", folder / "loss.png")
    print(json.dumps(facts, indent=2))


def draw(log: Path, picture: Path) -> None:
    """Training loss and held-out bits per byte over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    scored = [row for row in rows if "held_out_bits_per_byte" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], lw=1, label="training loss (nats a token)")
    axes.plot(
        [r["tokens"] / 1e6 for r in scored],
        [r["held_out_bits_per_byte"] for r in scored],
        "o-",
        ms=3,
        label="held-out bits per byte (first windows of each book)",
    )
    axes.set(xlabel="million tokens seen", ylim=(1, 6))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
