"""What to calibrate on: the model's own text, the shipped prose, or WikiText-2, each judged on three kinds of text.

    python benchmarks/calibration_texts.py CHECKPOINT SCRATCH --wikitext wiki.test.raw --stories tinystories_val.txt
        [--calibration-tokens 16384] [--text-tokens 2048] [--remove 2] [--gap LAYER]

Prints Markdown: KL against the checkpoint in nats a token, and the growth of perplexity. GPTQ and round to nearest at 4 bits in
groups of 64, head and embedding float; the layers of lowest Block Influence removed; and one layer removed (--gap, default: the one
of lowest influence on the prose) and healed linearly, as every build does it. WikiText-2 is judged on its first tokens and
calibrated on what follows its 100,000th; the code is 60 lines of each of some modules of the standard library. Folders in SCRATCH
are kept, so an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SELF, HealOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.stages import source_of
from edgepress.pipeline.text.windows import text_windows

WINDOW = 512
MODULES = (
    "argparse",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "mailbox",
    "pprint",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
    "zipapp",
)


@dataclass(frozen=True)
class Kind:
    """A text to calibrate on, and the tokens at its beginning to leave alone."""

    text: Path
    skip: int = 0


@dataclass(frozen=True)
class Judge:
    """The original's logits on the windows of each text."""

    texts: dict[str, list[np.ndarray]]
    logits: dict[str, list[np.ndarray]]

    @classmethod
    def of(cls, model: Path, texts: dict[str, Path], tokens: int) -> Judge:
        """Of windows of the first ``tokens`` tokens."""
        whole = load_model(model)
        windows = {name: text_windows(text, model, budget=tokens, length=WINDOW) for name, text in texts.items()}
        return cls(windows, {name: [logits_of(whole, row) for row in rows] for name, rows in windows.items()})

    def row(self, title: str, calibration: str, detail: str, folder: Path) -> None:
        """Print one row: a checkpoint on all texts."""
        model, cells = load_model(folder), [title, calibration, detail]
        for name, windows in self.texts.items():
            scores = Quality()
            for ids, reference in zip(windows, self.logits[name], strict=True):
                scores.add(ids, logits_of(model, ids), reference)
            growth = 100 * np.expm1(scores.loss_change()[0])
            cells += [f"{scores.figures()['kl_mean']:.4f}", f"{growth:+.1f} %"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--remove", type=int, default=2)
    parser.add_argument("--gap", type=int)
    options = parser.parse_args()
    source, scratch, tokens = source_of(options.checkpoint), options.scratch, options.calibration_tokens
    scratch.mkdir(parents=True, exist_ok=True)
    texts = {"WikiText-2": options.wikitext, "TinyStories": options.stories, "code": code(scratch / "code.txt")}
    kinds = {"self": Kind(SELF), "prose": Kind(CALIBRATION_TEXT), "WikiText-2": Kind(options.wikitext, 100_000)}
    judge = Judge.of(source.path, texts, options.text_tokens)
    print("| what | calibrated on | layers | " + " | ".join(f"{name}: KL | perplexity" for name in texts) + " |")
    print("| --- | --- | --- |" + " ---: |" * (2 * len(texts)))
    rounded = QuantizeOptions(method="rtn", bits=4, group_size=64, head_bits=16)
    judge.row("round to nearest", "nothing", "", stages.run("quantize", source, scratch / "rtn", rounded).path)
    for name, kind in kinds.items():
        gptq = QuantizeOptions(bits=4, group_size=64, head_bits=16, calibration=kind.text, calibration_skip=kind.skip)
        gptq = replace(gptq, calibration_tokens=within(kind, source, tokens))
        judge.row("GPTQ", name, "", stages.run("quantize", source, scratch / f"gptq-{name}", gptq).path)
    gap = options.gap
    for name, kind in kinds.items():
        choice = PruneOptions(criterion="bi", remove_count=options.remove, calibration=kind.text, calibration_skip=kind.skip)
        choice = replace(choice, calibration_tokens=within(kind, source, tokens))
        pruned = stages.run("prune", source, scratch / f"bi-{name}", choice)
        facts = pruned.steps[-1].facts
        judge.row("lowest influence out", name, ", ".join(map(str, facts["removed_layers"])), pruned.path)
        gap = int(np.argmin(facts["influences"])) if gap is None and name == "prose" else gap
    pruned = stages.run("prune", source, scratch / "gap", PruneOptions(remove_layers=(int(gap),)))
    judge.row("one layer out", "nothing", str(gap), pruned.path)
    for name, kind in kinds.items():
        linear = HealOptions(original=source.path, calibration=kind.text, calibration_skip=kind.skip)
        linear = replace(linear, calibration_tokens=within(kind, source, tokens))
        healed = stages.run("heal", pruned, scratch / f"healed-{name}", linear)
        refused = "" if healed.steps[-1].facts["accepted"] else " (refused)"
        judge.row("one layer out, healed", name, f"{gap}{refused}", healed.path)


def within(kind: Kind, source: Artifact, tokens: int) -> int:
    """As many tokens as asked for, or as the text has."""
    if kind.text == SELF:
        return tokens
    return min(tokens, sum(map(len, text_windows(kind.text, source.path, budget=tokens, skip=kind.skip, length=64))) // 64 * 64)


def code(file: Path) -> Path:
    folder = Path(sysconfig.get_path("stdlib"))
    file.write_text("\n".join(line for name in MODULES for line in (folder / f"{name}.py").read_text().splitlines()[100:160]))
    return file


if __name__ == "__main__":
    main()
