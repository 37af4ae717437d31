"""One speed and memory measurement, in a process that does nothing else: numpy, onnxruntime and the shipped files.

python -m edgepress.pipeline.worker ARTIFACT OPTIONS.json      (what bench starts; prints one JSON object)
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.runtime import Decoder

WARM_UP_TOKENS = 8


def measure(folder: Path, ids: list[int], prompt_lengths: list[int], new_tokens: int, threads: int) -> dict[str, Any]:
    """One sample of each figure. ids: fixed token ids, at least as many as the longest prompt.

    Times are wall clock: load in seconds, inter-token and first token in milliseconds. The first token's time is
    the prefill of the whole prompt and its argmax; warm-up is left out.
    """
    importlib.import_module("onnxruntime")  # before the clock: loading is the artifact's time, not the library's
    begun = time.perf_counter()
    decoder = Decoder(folder, threads=threads)
    found: dict[str, Any] = {"load_s": time.perf_counter() - begun, "prefill": {}}
    prompt = np.array(ids, dtype=np.int64)

    def timed(piece: np.ndarray) -> tuple[float, int]:
        start = time.perf_counter()
        token = int(decoder.feed(piece)[-1].argmax())
        return time.perf_counter() - start, token

    for length in prompt_lengths:
        decoder.reset()
        timed(prompt[:length])  # warm-up: allocates for this length
        decoder.reset()
        seconds, _ = timed(prompt[:length])
        found["prefill"][str(length)] = seconds
    decoder.reset()
    _, token = timed(prompt[: min(prompt_lengths)])
    for _ in range(WARM_UP_TOKENS):
        _, token = timed(np.array([token]))
    steps = []
    for _ in range(new_tokens):
        seconds, token = timed(np.array([token]))
        steps.append(seconds)
    found["inter_token_ms"] = [1000 * s for s in steps]
    return found | memory()


def memory() -> dict[str, int]:
    """Peak resident and current proportional bytes of this process; what the system does not tell is left out.

    VmHWM, not ru_maxrss: the latter is inherited over exec, so a child of a big process starts with its parent's peak.
    """
    found: dict[str, int] = {}
    try:
        status = Path("/proc/self/status").read_text()
        found["peak_rss_bytes"] = 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM"))
        rollup = Path("/proc/self/smaps_rollup").read_text()
        found["pss_bytes"] = 1024 * next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
    except (OSError, StopIteration):
        if os.name == "posix" and "peak_rss_bytes" not in found:
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
            found["peak_rss_bytes"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def main() -> None:
    """Entry point of the process."""
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    print(json.dumps(measure(folder, **json.loads(file.read_text()))))


if __name__ == "__main__":
    main()
