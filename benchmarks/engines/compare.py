"""Our artifacts beside what people run otherwise: onnxruntime-genai's model builder and llama.cpp, in one interleaved run.

    python benchmarks/engines/compare.py --shape qwen --llama LLAMA_PYTHON [--repeats 5] [--build-only]
    python benchmarks/engines/compare.py --shape reference --llama LLAMA_PYTHON --text HELD_OUT.txt

Shapes smol (SmolLM2-135M), qwen (Qwen2.5-0.5B) and llama (Llama-3.2-1B) have random weights, which cost the same time as trained
ones; ``reference`` is the embedded trained model, and adds quality: KL and perplexity of every engine's file over the same tokens.
LLAMA_PYTHON is the interpreter of an environment with llama.cpp, compiled for the processor at hand:

    python -m venv llama
    llama/bin/pip install llama-cpp-python==0.3.36 --no-binary llama-cpp-python
    llama/bin/pip install gguf

Each sample comes from a fresh process; a round runs every engine once, each round in another order. Everybody has the same number
of threads and the same GLIBC_TUNABLES. Files are built once in --work, samples kept there: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.models import REFERENCE
from edgepress.pipeline.bench.jobs import Bandwidth, BandwidthJob, SpeedJob, SpeedSample
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.launch import measured
from edgepress.pipeline.report.stats import ratio
from edgepress.pipeline.text.windows import text_windows
from engine_files import TITLES, build, process

PROMPT, NEW_TOKENS = 128, 64
TUNABLES = "glibc.malloc.hugetlb=1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=TITLES, default="smol")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--text", type=Path, help="held-out text for the reference model's quality")
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, default=Path("out/engines"), help="built files and samples (default: out/engines)")
    parser.add_argument("--build-only", action="store_true", help="build the files, measure nothing")
    parser.add_argument(
        "--profile", action="store_true", help="where a decoding step of our artifacts spends its time, by operator"
    )
    options = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = TUNABLES  # every process below inherits it
    folder = options.work / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    engines = build(options.shape, folder, options.llama)
    if options.build_only:
        return
    if options.profile:
        return profile(engines, options.threads)
    journal = Journal(folder / "samples.jsonl", threads=options.threads, tunables=TUNABLES)
    samples, bandwidth = rounds(engines, options, journal)
    print(f"{TITLES[options.shape]}, {options.threads} threads, GLIBC_TUNABLES={TUNABLES}, medians of {options.repeats} rounds, "
          f"memory {bandwidth / 1e9:.1f} GB/s\n")  # fmt: skip
    speed_table(engines, samples)
    removal(engines, samples)
    if options.shape == "reference" and options.text:
        quality_table(engines, samples, folder, options)


def rounds(
    engines: dict[str, dict[str, Any]], options: argparse.Namespace, journal: Journal
) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Samples of every engine that is here, by round, and the memory's bandwidth in bytes/s."""
    ids = [int(i) for i in np.random.default_rng(0).integers(1, 5000, PROMPT)]
    present = [name for name, engine in engines.items() if "kind" in engine]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
    widths = []
    for number in range(options.repeats):
        job = BandwidthJob(options.threads)
        width = journal.once(Bandwidth, lambda job=job: measured("bandwidth", job, Bandwidth), "bandwidth", number)  # type: ignore[misc]
        widths.append(width.bytes_per_s)
        for name in random.Random(number).sample(present, len(present)):
            stamp = max(p.stat().st_mtime_ns for p in [Path(engines[name]["file"]), *Path(engines[name]["file"]).glob("*")])
            engine = engines[name]
            sample = journal.once(dict[str, float], lambda e=engine: speed(e, ids, options), name, stamp, number)  # type: ignore[misc]
            found[name].append(sample)
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found, float(np.median(widths))


def speed(engine: dict[str, Any], ids: list[int], options: argparse.Namespace) -> dict[str, float]:
    """One sample from a fresh process: tokens/s of the prompt and of what follows, and peak bytes."""
    common = {"ids": ids, "new_tokens": NEW_TOKENS, "threads": options.threads}
    if engine["kind"] == "ours":
        job = SpeedJob(engine["file"], tuple(ids), (PROMPT,), NEW_TOKENS, options.threads)
        ours = measured("speed", job, SpeedSample)
        one = {
            "prefill_s": ours.prefill[str(PROMPT)],
            "inter_token_ms": ours.inter_token_ms,
            "peak_rss_bytes": ours.values["memory.peak_rss_bytes"],
        }
    elif engine["kind"] == "genai":
        one = process(sys.executable, "genai_speed", common | {"folder": engine["file"]})
    else:
        one = process(options.llama, "llama_speed", common | {"file": engine["file"]})
    steps = one["inter_token_ms"]
    return {"prefill": PROMPT / one["prefill_s"], "decode": 1000 * len(steps) / sum(steps), "rss": one["peak_rss_bytes"]}


def median(samples: list[dict[str, Any]], figure: str) -> float:
    return float(np.median([sample[figure] for sample in samples]))


def against(samples: dict[str, list[dict[str, Any]]], name: str, other: str, figure: str) -> str:
    """Ratio with its 99 % interval, "" where one is not there."""
    if name == other or other not in samples:
        return ""
    found = ratio([s[figure] for s in samples[name]], [s[figure] for s in samples[other]])
    return f" ({found.value:.2f}x" + (")" if math.isinf(found.high) else f", {found.low:.2f} to {found.high:.2f})")


def speed_table(engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]) -> None:
    """In brackets the ratio to llama.cpp Q4_0 with its 99 % interval, from the pairs of each round."""
    print("| engine | head | bits a block weight | MB per token | prefill 128 tok/s | decode tok/s | decode GB/s | peak RSS MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, engine in engines.items():
        if "missing" in engine:
            print(f"| {name} | not installed: `{engine['missing']}` | | | | | | |")
            continue
        speeds = (f"{median(samples[name], f):.0f}{against(samples, name, 'llama.cpp Q4_0', f)}" for f in ("prefill", "decode"))
        read = f"{median(samples[name], 'decode') * engine['bytes_per_token'] / 1e9:.1f}"
        peak = f"{median(samples[name], 'rss') / 2**20:.0f}{against(samples, name, 'llama.cpp Q4_0', 'rss')}"
        print(f"| {name} | {engine['head']} | {engine['block_bits']:.2f} | {engine['bytes_per_token'] / 1e6:.0f} |",
              " | ".join((*speeds, read, peak)), "|")  # fmt: skip


def removal(engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]) -> None:
    """What removing layers brought, beside what the bytes promise."""
    for name in samples:
        whole, _, cut = name.rpartition(", ")
        if not cut.endswith("removed") or whole not in samples:
            continue
        promised = engines[whole]["bytes_per_token"] / engines[name]["bytes_per_token"]
        found = ratio([s["decode"] for s in samples[name]], [s["decode"] for s in samples[whole]])
        print(f"\n{cut}: decode {found.value:.3f} times ({found.low:.3f} to {found.high:.3f}); "
              f"bytes promise {promised:.3f}; {found.value / promised:.3f} of it")  # fmt: skip


def profile(engines: dict[str, dict[str, Any]], threads: int) -> None:
    """Milliseconds a token by operator, as onnxruntime's profiler has them; the profiler itself costs some."""
    import onnxruntime
    from edgepress.pipeline.runtime.decoder import Decoder

    plain, ids = onnxruntime.SessionOptions, np.random.default_rng(0).integers(1, 5000, PROMPT)

    def profiled() -> Any:
        options = plain()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "edgepress-profile")
        return options

    for name, engine in engines.items():
        if engine.get("kind") != "ours":
            continue
        onnxruntime.SessionOptions = profiled
        decoder = Decoder(Path(engine["file"]), threads=threads)
        onnxruntime.SessionOptions = plain
        decoder.feed(ids)
        for _ in range(NEW_TOKENS):
            decoder.feed(ids[:1])
        file = Path(decoder.session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        runs = sorted((e["ts"], e["dur"]) for e in events if e["name"] == "model_run")[-NEW_TOKENS:]
        spent: dict[str, float] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[0][0]:
                kind = "head" if event["name"].startswith("lm_head") else event["args"]["op_name"]
                spent[kind] = spent.get(kind, 0) + event["dur"] / 1000 / NEW_TOKENS
        whole = sum(duration for _, duration in runs) / 1000 / NEW_TOKENS
        spent["outside any kernel"] = whole - sum(spent.values())
        shares = ", ".join(f"{kind} {ms:.2f} ({100 * ms / whole:.0f} %)" for kind, ms in sorted(spent.items(), key=lambda x: -x[1]))
        print(f"{name}: {whole:.2f} ms a token: {shares}")


def quality_table(
    engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]], folder: Path, options: argparse.Namespace
) -> None:
    """KL against the original's logits, and perplexity, of each engine's own file over the same tokens."""
    from engine_quality import quality, save_logits

    windows = text_windows(options.text, REFERENCE, budget=options.text_tokens)
    print(f"\n{sum(len(ids) - 1 for ids in windows):,} tokens of {options.text.name}\n")
    print("| engine | head | bits a block weight | file MB | MB per token | KL, nats | top-1 | perplexity | decode tok/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        truth, own = Path(scratch) / "truth.npy", Path(scratch) / "own.npy"
        save_logits({"kind": "torch", "file": str(REFERENCE)}, windows, truth, options.llama, options.threads)
        whole = quality(windows, truth, truth)
        print(f"| original, torch float32 | | | | | 0 | 1 | {whole['perplexity']:.3f} | |")
        for name, engine in engines.items():
            if "missing" not in engine:
                save_logits(engine, windows, own, options.llama, options.threads)
                found = quality(windows, own, truth)
                print(f"| {name} | {engine['head']} | {engine['block_bits']:.2f} | {engine['file_bytes'] / 1e6:.2f} |"
                      f" {engine['bytes_per_token'] / 1e6:.2f} | {found['kl_mean']:.5f} | {found['top1_agreement']:.4f} |"
                      f" {found['perplexity']:.3f} | {median(samples[name], 'decode'):.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
