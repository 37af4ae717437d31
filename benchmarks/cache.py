"""A cache of int8 beside one of floats: memory, speed of a step at several lengths (in turn), and what it costs on a long text.

python benchmarks/cache.py FLOAT INT8 --text FILE [--lengths 512,4096,16384]      (two artifacts, without and with --cache int8)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from edgepress.pipeline.bench.memory import peak_rss
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.report.stats import ratio
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows

CHUNK, STEPS, SCORED = 256, 24, 512


def fill(decoder: Decoder, ids: np.ndarray) -> None:
    """Read so many tokens, in pieces that keep activations small."""
    decoder.reset(len(ids) + STEPS + SCORED)
    for first in range(0, len(ids), CHUNK):
        decoder.feed(ids[first : first + CHUNK])


def child(folder: Path, length: int, text: Path, threads: int) -> None:
    """Seconds of each step after ``length`` tokens, bytes of the cache, and peak memory."""
    decoder = Decoder(folder, threads=threads)
    ids = text_windows(text, folder, budget=length + STEPS, length=length + STEPS)[0]
    fill(decoder, ids[:length])
    seconds = []
    for token in ids[length : length + STEPS]:
        begun = time.perf_counter()
        decoder.feed(np.array([token]))
        seconds.append(time.perf_counter() - begun)
    print(float(np.median(seconds[2:])), decoder.cache_bytes(length), peak_rss() or 0)


def divergence(exact: Path, small: Path, text: Path, length: int) -> float:
    """KL divergence, nats a token, of the last SCORED tokens of a text of ``length``: both read the same through their cache."""
    ids, quality, logits = text_windows(text, exact, budget=length, length=length)[0], Quality(), []
    for folder in (exact, small):
        decoder = Decoder(folder)
        fill(decoder, ids[: length - SCORED])
        logits.append(np.concatenate([decoder.feed(part, keep=0) for part in np.split(ids[length - SCORED :], SCORED // 64)]))
        del decoder
    quality.add(ids[length - SCORED :], logits[1], logits[0])
    return float(quality.figures()["kl_mean"])


def main() -> None:
    """Print one row a length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exact", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", default="512,4096,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    if options.child:
        child(options.small, options.child, options.text, options.threads)
        return
    context = Decoder(options.exact).context
    print("| tokens | cache, float MB | int8 MB | peak RSS, float MB | int8 MB | step, float ms | int8 ms | faster by | KL, nats |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in map(int, options.lengths.split(",")):
        if length + STEPS > context:
            print(f"| {length} | beyond the context of {context} |")
            continue
        rows: dict[Path, list[list[float]]] = {options.exact: [], options.small: []}
        for number in range(options.rounds):
            order = list(rows)[:: 1 if number % 2 == 0 else -1]
            for folder in order:
                command = [sys.executable, __file__, str(options.exact), str(folder), "--text", str(options.text)]
                command += ["--child", str(length), "--threads", str(options.threads)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows[folder].append([float(value) for value in out.split()])
        exact, small = (np.array(rows[folder]) for folder in (options.exact, options.small))
        faster = ratio(exact[:, 0].tolist(), small[:, 0].tolist())
        kl = divergence(options.exact, options.small, options.text, max(length, 2 * SCORED))
        print(
            f"| {length:,} | {exact[0, 1] / 1e6:.1f} | {small[0, 1] / 1e6:.1f} | {np.median(exact[:, 2]) / 1e6:.0f} "
            f"| {np.median(small[:, 2]) / 1e6:.0f} | {1000 * np.median(exact[:, 0]):.2f} | {1000 * np.median(small[:, 0]):.2f} "
            f"| {faster.value:.2f}x ({faster.low:.2f} to {faster.high:.2f}) | {kl:.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
