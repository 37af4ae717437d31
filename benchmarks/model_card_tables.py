"""The tables of a model's card: what each layer, and each bit, is worth on held-out books.

    python benchmarks/model_card_tables.py models/reference ../shared/data/novels/ENG18610_Eliot.txt [...] [--tokens 20000]

Prints Markdown: perplexity and bits per byte of the model whole, without each single layer, without its 1 to n layers
of lowest Block Influence, and rounded to nearest at 8, 4 and 3 bits; then greedy and sampled text. The layers are
ranked on the shipped calibration text, never on the books that they are judged by.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import Blocks, block_linears
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.text.windows import load_tokenizer, text_windows
from transformers import AutoTokenizer, PreTrainedModel

PROMPTS = ("The old house stood", '"I cannot think," said Margaret,', "It was a cold morning in November, and")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=20000, help="tokens of each text (default: 20000)")
    parser.add_argument("--lowest", type=int, default=6, help="remove up to this many layers of lowest influence (default: 6)")
    options = parser.parse_args()
    model = load_model(options.model)
    tokenizer = load_tokenizer(options.model)
    windows = [row for text in options.texts for row in text_windows(text, options.model, budget=options.tokens)]
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=False).encode()) for row in windows)
    blocks = Blocks(model)
    influences = measure_influence(blocks, text_windows(CALIBRATION_TEXT, options.model, budget=32768)).block_influence
    order = [int(i) for i in np.argsort(influences, kind="stable")]

    def row(name: str, nats: float) -> None:
        count = sum(len(w) - 1 for w in windows)
        print(
            f"| {name} | {math.exp(nats / count):.2f} | {nats / math.log(2) / text_bytes:.4f} | {100 * (nats / whole - 1):+.1f} % |"
        )

    whole = total(model, windows)
    print(f"{sum(len(w) - 1 for w in windows):,} tokens of {', '.join(t.stem for t in options.texts)}\n")
    print("| model | perplexity | bits per byte | loss |\n| --- | ---: | ---: | ---: |")
    row("whole", whole)
    for index, influence in enumerate(influences):
        with blocks.without([index]):
            row(f"without layer {index} (influence {influence:.4f})", total(model, windows))
    for count in range(1, options.lowest + 1):
        with blocks.without(order[:count]):
            row(f"without the {count} of lowest influence ({', '.join(map(str, sorted(order[:count])))})", total(model, windows))
    for bits in (8, 4, 3):
        rounded = load_model(options.model)
        for name, linear in block_linears(rounded).items():
            weight = linear.weight.detach().numpy()
            packed = round_to_nearest(name, weight, bits, 64, symmetric=False)
            linear.weight.data = torch.from_numpy(packed.dequantized())
        row(f"blocks rounded to nearest, {bits} bits, groups of 64", total(rounded, windows))
    samples(model, options.model)


def total(model: PreTrainedModel, windows: list[np.ndarray]) -> float:
    """Summed negative log-likelihood in nats."""
    return mean_loss(model, windows) * sum(len(row) - 1 for row in windows)


def samples(model: PreTrainedModel, folder: Path) -> None:
    """Greedy and sampled continuations by transformers' own generate."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        for name, settings in (
            ("greedy", {"do_sample": False}),
            ("sampled at 0.8", {"do_sample": True, "temperature": 0.8, "top_k": 50}),
        ):
            torch.manual_seed(0)
            ids = tokenizer(prompt, return_tensors="pt")
            new = model.generate(input_ids=ids["input_ids"], max_new_tokens=60, pad_token_id=tokenizer.eos_token_id, **settings)
            print(f"\n{name}:\n\n> {tokenizer.decode(new[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
