"""Whether an imported GGUF computes what llama.cpp computes with the same file, as far as llama.cpp's own rounding allows.

    python benchmarks/engines/gguf_logits.py MODEL.gguf [...] --text TEXT --llama LLAMA_PYTHON [--tokens 512]

LLAMA_PYTHON: see compare.py. Prints Markdown: KL(transformers || llama.cpp), top-1 agreement and largest difference of logits
over the tokens, each engine in a process of its own. The kernels of llama.cpp round the activations that meet a quantized matrix
to 8 bits and the cache to float16, so each model is shown three times:

- the file as it is, run as it comes;
- the file with its weights dequantized to float32 by llama.cpp, the cache in float32: nothing is rounded, so where names, orders
  of rows, rotary embeddings and dequantized values are the same, only the order of additions is left;
- the float32 GGUF that is written from the imported checkpoint, in the same way.

A file that stores head and embedding as two roundings of one tied matrix is imported with the finer for both; the first two rows
are then against what transformers makes of the file before that. The embedded model, never a GGUF, has the last row alone.
llama.cpp reads GELU from a table of float16 values, weights in float32 or not. How far that alone moves logits is shown for models
that have it: transformers with such a table against itself with embeddings that are changed by 1e-7 of themselves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.models import EVALUATION_TEXT, REFERENCE
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.files import read_json
from edgepress.pipeline.text.windows import text_windows
from engine_files import convert, process
from engine_quality import by_window, quality, save_logits

COLUMNS = "| model | llama.cpp runs | against | KL, nats | top-1 | largest difference of logits | their spread |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, default=EVALUATION_TEXT)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="python of an environment with llama-cpp-python and gguf")
    options = parser.parse_args()
    print(f"{COLUMNS}\n| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for file in options.files:
        imported = stages.source_of(str(file))
        untied = bool(imported.steps[0].facts["tied_from_two_matrices"])
        compared(file.stem, imported, file, untied, options)
    compared("reference", Artifact.load(REFERENCE), None, False, options)


def compared(name: str, imported: Artifact, file: Path | None, untied: bool, options: argparse.Namespace) -> None:
    """The rows of one model."""
    windows = text_windows(options.text, imported.path, budget=options.tokens, length=512)
    with tempfile.TemporaryDirectory(prefix="gguf-logits-") as scratch:
        folder = Path(scratch)

        def logits(engine: dict[str, Any], out: str) -> Path:
            save_logits(engine, windows, folder / out, options.llama, options.threads)
            return folder / out

        ours = logits({"kind": "torch", "file": str(imported.path)}, "ours.npy")
        if file is not None:
            theirs, against = ours, "imported checkpoint"
            if untied:
                theirs = logits({"kind": "torch", "file": str(file.parent), "gguf_file": file.name}, "untied.npy")
                against = "the file in transformers, head and embedding apart"
            row(name, "the file", against, windows, logits({"kind": "llama", "file": str(file)}, "llama.npy"), theirs)
            whole = folder / "dequantized.gguf"
            process(options.llama, "requantize", {"file": str(file), "out": str(whole), "kind": "F32"})
            found = logits({"kind": "llama", "file": str(whole), "exact": True}, "llama.npy")
            row(name, "the file's weights in float32", against, windows, found, theirs)
            whole.unlink()
        convert(imported.path, folder / "gguf", options.llama, ["F32"])
        found = logits({"kind": "llama", "file": str(folder / "gguf" / "F32.gguf"), "exact": True}, "llama.npy")
        row(name, "float32 from the checkpoint", "imported checkpoint" if file else "checkpoint", windows, found, ours)
        if str(read_json(imported.path / "config.json").get("hidden_activation", "")).startswith("gelu"):
            one, other = ({"kind": "torch", "file": str(imported.path), "gelu_noise": noise} for noise in (0.0, 1e-7))
            row(name, "(none)", "float16 GELU in transformers, 1e-7", windows, logits(other, "other.npy"), logits(one, "one.npy"))


def row(name: str, runs: str, against: str, windows: list[np.ndarray], found: Path, truth: Path) -> None:
    figures = quality(windows, found, truth)
    pairs = list(zip(by_window(found, windows), by_window(truth, windows), strict=True))
    largest = max(float(np.abs(a - b).max()) for a, b in pairs)
    spread = float(np.mean([b.std() for _, b in pairs]))
    print(f"| {name} | {runs} | {against} | {figures['kl_mean']:.1e} | {100 * figures['top1_agreement']:.1f} % | {largest:.1e} |"
          f" {spread:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
