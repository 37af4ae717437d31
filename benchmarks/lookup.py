"""Decoding with guesses looked up in the text and without, in turn: tokens/s, passes, and whether the tokens are equal.

    python benchmarks/lookup.py ARTIFACT [--kinds edit,summarise,complete,chat --prompts 10 --new-tokens 160 --threads 2]

Prompts are this project's own: its functions to be edited and continued, sections of its documents to be summarised, and
questions of models/prompts.txt. All but ``complete`` go through the artifact's chat template.
"""

from __future__ import annotations

import argparse
import ast
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from edgepress.pipeline.report.stats import ratio
from edgepress.pipeline.runtime.chat import end_of_turn
from edgepress.pipeline.runtime.chat_template import ChatTemplate, read_template
from edgepress.pipeline.runtime.generate import TextModel, tokens
from edgepress.pipeline.runtime.sampler import Sampler, Sampling

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--prompts", type=int, default=10, help="of each kind (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", action="store_true", help="print what passes over more than one token take, and no more")
    options = parser.parse_args()
    model, template = TextModel(options.artifact, options.threads), read_template(options.artifact)
    if options.passes:
        print(", ".join(f"{count} tokens {share:.2f}" for count, share in costs(model).items()))
        return
    stop = model.stop | end_of_turn(options.artifact, model.tokenizer)
    print("| prompts | new tokens | equal | off, tokens/s | auto, tokens/s | auto / off | tokens a pass |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for kind in options.kinds.split(","):
        rows, counts, equal, passes = list[tuple[float, float]](), 0, 0, 0
        for number, prompt in enumerate(islice(KINDS[kind](), options.prompts)):
            ids = encoded(model, template if kind != "complete" else None, prompt)
            ids = ids[-(model.decoder.context - options.new_tokens) :]
            found = {}
            for wish in ("off", "auto") if number % 2 else ("auto", "off"):
                found[wish] = timed(model, ids, stop, options.new_tokens, wish)
            (plain, off, _), (new, auto, used) = found["off"], found["auto"]
            if len(plain) < 8:
                continue
            equal += plain == new
            counts, passes = counts + len(new), passes + used
            rows.append((off / (len(plain) - 1), auto / (len(new) - 1)))
        slow, fast = np.array(rows).T
        gain = ratio(slow, fast)
        cells = [
            f"{kind}, {len(rows)}", counts, f"{equal} of {len(rows)}", f"{1 / slow.mean():.1f}", f"{1 / fast.mean():.1f}",
            f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})", f"{counts / passes:.2f}",
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def encoded(model: TextModel, template: ChatTemplate | None, prompt: str) -> np.ndarray:
    if template is None:  # of a model that continues text
        return np.array(model.tokenizer.encode(prompt).ids)
    text = template.render([{"role": "user", "content": prompt}])
    return np.array(model.tokenizer.encode(text, add_special_tokens=False).ids)


def timed(model: TextModel, ids: np.ndarray, stop: frozenset[int], limit: int, wish: str) -> tuple[list[int], float, int]:
    """New tokens, the seconds from the first of them to the last, and the passes that they took."""
    decoder = model.decoder
    decoder.reset(len(ids) + limit)
    real, passes = decoder.feed, 0

    def feed(ids: np.ndarray, keep: int = 1) -> np.ndarray:
        nonlocal passes
        passes += 1
        return real(ids, keep)

    decoder.feed = feed  # type: ignore[method-assign]
    try:
        new = tokens(decoder, ids, stop, limit, Sampler(Sampling(), np.random.default_rng(0)), model.lookup(wish, ids.tolist()))
        found = [token for token in [next(new, None)] if token is not None]
        begun = time.perf_counter()
        found += new
        return found, time.perf_counter() - begun, max(1, passes - 1)
    finally:
        decoder.feed = real  # type: ignore[method-assign]


def costs(model: TextModel, context: int = 512, rounds: int = 15) -> dict[int, float]:
    """Median seconds of a pass over so many tokens behind ``context`` of them, in passes over one; the sizes in turn."""
    decoder, random = model.decoder, np.random.default_rng(0)
    ids = random.integers(0, len(model.tokenizer.get_vocab()), context)
    decoder.reset(context + 32)
    decoder.feed(ids)
    seconds: dict[int, list[float]] = {count: [] for count in (1, 2, 3, 4, 5, 7, 9, 13, 17)}
    for _ in range(rounds):
        for count, found in seconds.items():
            begun = time.perf_counter()
            decoder.feed(ids[:count], keep=0)
            found.append(time.perf_counter() - begun)
            decoder.rewind(context)
    return {count: float(np.median(found) / np.median(seconds[1])) for count, found in seconds.items()}


def functions() -> Iterator[str]:
    """Of this project, 12 to 30 lines long, one of each file in turn."""
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        text = path.read_text()
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        bodies = [ast.get_source_segment(text, node) or "" for node in found if 12 <= node.end_lineno - node.lineno < 30]  # type: ignore[operator]
        if bodies:
            yield bodies[0]


def edit() -> Iterator[str]:
    for body in functions():
        name = re.search(r"\b(\w+) = ", body)
        if name:
            task = f"Rename the variable `{name[1]}` to `result` in this Python function and write the whole function."
            yield f"{task}\n\n```python\n{body}\n```"


def complete() -> Iterator[str]:
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        lines = path.read_text().splitlines()
        if len(lines) > 90:
            yield "\n".join(lines[:70]) + "\n"


def summarise() -> Iterator[str]:
    for path in sorted((ROOT / "docs").glob("*.md")):
        for section in path.read_text().split("\n## ")[1:]:
            if 900 < len(section) < 3000 and "|" not in section:
                yield f"Summarise this text in a few sentences, with quotations from it.\n\n{section}"
                break


def chat() -> Iterator[str]:
    yield from (ROOT / "models/prompts.txt").read_text().splitlines()


KINDS = {"edit": edit, "summarise": summarise, "complete": complete, "chat": chat}

if __name__ == "__main__":
    main()
