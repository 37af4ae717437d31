"""Bits by measurement against the same bits everywhere, at equal bytes, and what was estimated beside what was measured.

    python benchmarks/mixed_bits.py CHECKPOINT --text TEXT [--text TEXT] [--tokens 2048] [--skip 4000] [--targets 5.2,6,7]
        [--calibration TEXT|self|mixed] [--calibration-tokens 4096] [--targets-only]

All matrices of the blocks rounded to nearest, without scales tuned or errors compensated; KL against the float model on each
``--text``, of which the choice has seen nothing. Bytes are those of the packed blocks, scales and zero points counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import SensitivityOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.quantize.mix import FORMS, Form, by_matrix, mean_bits, solve
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.quantize.sensitivity import WINDOW, items_of_model
from edgepress.pipeline.text.windows import text_windows

UNIFORM = (Form(2, 32), Form(4, 128), Form(4, 64), Form(4, 32), Form(8, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--skip", type=int, default=4000)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--targets", default="5.2,5.5,6,7")
    parser.add_argument("--targets-only", action="store_true", help="leave out what has the same bits everywhere")
    options = parser.parse_args()
    given = SensitivityOptions(calibration=options.calibration, calibration_tokens=options.calibration_tokens)
    read = with_text(given, options.checkpoint, shipped=True).calibration
    model = Checkpoint(options.checkpoint).model()
    cut = {"budget": options.tokens, "skip": options.skip, "length": 256}
    windows = {text.stem: text_windows(text, options.checkpoint, **cut) for text in options.text}
    references = {name: [logits_of(model, ids) for ids in rows] for name, rows in windows.items()}
    begun = time.process_time()
    calibration = text_windows(read, options.checkpoint, budget=options.calibration_tokens, length=WINDOW)
    items, modules = items_of_model(model, calibration), block_linears(model)
    print(f"estimates: {time.process_time() - begun:.0f} s of CPU\n")
    print("| blocks | bits a weight | MB | estimated KL |" + "".join(f" {name}: KL, nats | perplexity |" for name in windows))
    print("| --- |" + " ---: |" * (3 + 2 * len(windows)))
    rows: list[tuple[str, list[Form]]] = []
    for form in () if options.targets_only else UNIFORM:
        uniform = [form] * len(items)
        size = sum(item.bytes[form] for item in items)
        rows += [(f"all {form}", uniform), ("chosen, in the same bytes", solve(items, FORMS, size=size))]
    weights = sum(item.weights for item in items)
    for target in map(float, options.targets.split(",")):
        rows.append(("chosen", solve(items, FORMS, size=target * weights / 8)))
    for label, forms in rows:
        scores = {name: Quality() for name in windows}
        with rounded(modules, by_matrix(items, forms)):
            for name, found in scores.items():
                for ids, reference in zip(windows[name], references[name], strict=True):
                    found.add(ids, logits_of(model, ids), reference)
        estimate, size = (sum(getattr(i, what)[f] for i, f in zip(items, forms, strict=True)) for what in ("costs", "bytes"))
        cells = [label, f"{mean_bits(items, forms):.2f}", f"{size / 1e6:.1f}", f"{estimate:.4f}"]
        for found in scores.values():
            cells += [f"{found.figures()['kl_mean']:.4f}", f"{100 * np.expm1(found.loss_change()[0]):+.1f} %"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
