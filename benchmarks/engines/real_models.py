"""One trained model: the original, our artifacts and llama.cpp's files, their bytes, quality and speed in one interleaved run.

    python benchmarks/engines/real_models.py ORIGINAL --artifact DIR [--artifact DIR] --llama LLAMA_PYTHON
        --text wiki.test.raw --text stories.txt [--text-tokens 8192] [--gguf FILE] [--types Q8_0,Q4_K_M] [--repeats 7]

ORIGINAL: a checkpoint (llama, qwen2, gemma3; the import of a build, or one that was healed), or a .gguf file, which is imported and
has a row of its own. LLAMA_PYTHON: see compare.py. llama.cpp's other files are quantized by llama.cpp from the checkpoint's floats.

Quality: every engine computes the logits of the same windows of 512 tokens itself; KL and top-1 agreement are against the original
in float32 by transformers. Speed: as in compare.py, a fresh process for every sample, every round in another order. MB are those of
the weights, for our artifacts with the graph; tokenizers are not counted. Built files and samples are kept in --work: an
interrupted run goes on, and --repeats 0 measures quality alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare import PROMPT, TUNABLES, against, median, rounds
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import onnx_folder
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.files import sha256
from edgepress.pipeline.text.windows import text_windows
from engine_files import convert, described, once, process
from engine_quality import quality, save_logits

CONTEXT = 512
Engines = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="an artifact, or the OUT of a build")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a file for llama.cpp to run as it is")
    parser.add_argument("--types", default="Q8_0,Q4_K_M", help="file types that llama.cpp makes of the original")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of speed (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, default=Path("out/real-models"), help="built files and samples (default: %(default)s)")
    options = parser.parse_args()
    if len({artifact.name for artifact in options.artifact}) < len(options.artifact):
        parser.error("two artifacts have one name, by which their rows are known; rename a folder")
    os.environ["GLIBC_TUNABLES"] = TUNABLES  # every process below inherits it
    busy = os.getloadavg()[0]
    source = stages.source_of(options.original)
    if options.original.endswith(".gguf"):
        options.gguf.insert(0, Path(options.original))
    folder = options.work / source.identity()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    engines = build(source.path, folder, options)
    journal = Journal(folder / "samples.jsonl", threads=options.threads, tunables=TUNABLES)
    columns = {text: scored(text, source.path, engines, folder, journal, options) for text in options.text}
    samples, bandwidth = rounds(engines, options, journal) if options.repeats else ({}, 0.0)
    print(f"{options.text_tokens:,} tokens of each text; {options.threads} threads, GLIBC_TUNABLES={TUNABLES}, medians of "
          f"{options.repeats} rounds, memory {bandwidth / 1e9:.1f} GB/s, load {busy:.1f} at the start\n")  # fmt: skip
    table(source.path, engines, columns, samples)


def build(source: Path, folder: Path, options: argparse.Namespace) -> Engines:
    """Row name -> how it is run and what is known of its file."""
    engines: Engines = {}
    for given in options.artifact:
        artifact = onnx_folder(given)
        engines[f"edgepress {given.name}"] = {"kind": "ours", "file": str(artifact.resolve())} | described(artifact)
    for file in options.gguf:
        known = process(options.llama, "describe", {"file": str(file)})
        engines[f"llama.cpp, {file.name}"] = {"kind": "llama", "file": str(file)} | known
    if types := options.types.split(",") if options.types else []:
        made = once(folder / ("gguf-" + "-".join(types)), lambda out: convert(source, out, options.llama, types))
        for name, known in json.loads((made / "files.json").read_text()).items():
            engines[f"llama.cpp {name}"] = {"kind": "llama", "file": str(made / f"{name}.gguf")} | known
    return engines


def scored(
    text: Path, source: Path, engines: Engines, folder: Path, journal: Journal, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Quality of every row, and of the original, on a text."""
    windows = text_windows(text, source, budget=options.text_tokens, length=CONTEXT)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        truth, own = Path(scratch) / "truth.npy", Path(scratch) / "own.npy"

        def measure(engine: dict[str, Any]) -> Callable[[], dict[str, float]]:
            def run() -> dict[str, float]:
                if not truth.exists():
                    save_logits({"kind": "torch", "file": str(source)}, windows, truth, options.llama, options.threads)
                if engine["kind"] == "torch":
                    return quality(windows, truth, truth)
                save_logits(engine, windows, own, options.llama, options.threads)
                return quality(windows, own, truth)

            return run

        for name, engine in {"original": {"kind": "torch", "file": str(source)}, **engines}.items():
            key = ("quality", sha256(text), options.text_tokens, engine["kind"], stamp(Path(engine["file"])))
            found[name] = journal.once(dict[str, float], measure(engine), *key)
            print(f"{text.stem}: {name}", file=sys.stderr, flush=True)
    return found


def stamp(file: Path) -> list[object]:
    """What changes when a file, or one in a folder, does."""
    return [str(file.resolve()), max(p.stat().st_mtime_ns for p in [file, *file.glob("*")])]


def table(
    source: Path, engines: Engines, columns: dict[Path, dict[str, dict[str, float]]], samples: dict[str, list[dict[str, Any]]]
) -> None:
    """In brackets the ratio of decode rates to the first file that llama.cpp runs, with its 99 % interval."""
    texts = "".join(f" {text.stem}: perplexity | KL, nats | top-1 |" for text in columns)
    print(f"| file | MB | head |{texts} decode tok/s | prefill {PROMPT} tok/s | TTFT @{PROMPT} ms | peak RSS MiB |")
    print("| --- | ---: | --- |" + " ---: |" * (3 * len(columns) + 4))
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    first = next((name for name, engine in engines.items() if engine["kind"] == "llama"), "")
    for name, engine in {"original": {"file_bytes": size, "head": "float32"}, **engines}.items():
        cells = [f"{engine['file_bytes'] / 1e6:.1f}", engine["head"]]
        for scores in columns.values():
            figures, whole = scores[name], scores["original"]["perplexity"]
            growth = "" if name == "original" else f" ({100 * (figures['perplexity'] / whole - 1):+.1f} %)"
            cells += [f"{figures['perplexity']:.2f}{growth}", f"{figures['kl_mean']:.4f}"]
            cells.append(f"{100 * figures['top1_agreement']:.1f} %")
        if name in samples:
            taken = samples[name]
            decode = f"{median(taken, 'decode'):.0f}{against(samples, name, first, 'decode')}"
            prefill = median(taken, "prefill")
            cells += [decode, f"{prefill:.0f}", f"{1000 * PROMPT / prefill:.0f}", f"{median(taken, 'rss') / 2**20:.0f}"]
        else:
            cells += [""] * 4
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
