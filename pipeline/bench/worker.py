"""One measurement in a process that does nothing else: speed and memory need numpy, onnxruntime and the shipped files alone.

python -m edgepress.pipeline.bench.worker KIND JOB.json      (what bench starts; prints JSON objects, one a line)
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.errors import EdgepressError
from edgepress.pipeline.registry import load
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.targets import gpu_memory

WARM_UP_TOKENS = 8
PREFILLS = 3  # of each prompt in one process; their median is its sample
BANDWIDTH_BYTES = 1 << 28  # larger than the caches of all but a few servers
BANDWIDTH_PASSES = 5


def speed(
    folder: str, ids: list[int], prompt_lengths: list[int], new_tokens: int, threads: int, target: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """One sample of each figure. ids: fixed token ids, at least as many as the longest prompt.

    Times are wall clock: load in seconds, inter-token in milliseconds. The first token's time is the prefill of the
    whole prompt and its argmax; warm-up is left out. Logits come back to the host, so no clock is read before the device is done.
    """
    importlib.import_module("onnxruntime")  # before the clock: loading is the artifact's time, not the library's
    begun = time.perf_counter()
    decoder = Decoder(Path(folder), threads=threads, target=target)
    found: dict[str, Any] = {"load_s": time.perf_counter() - begun, "prefill": {}}
    prompt = np.array(ids, dtype=np.int64)
    pss = [_pss()]

    def timed(piece: np.ndarray) -> tuple[float, int]:
        start = time.perf_counter()
        token = int(decoder.feed(piece)[-1].argmax())
        return time.perf_counter() - start, token

    for length in prompt_lengths:
        decoder.reset()
        timed(prompt[:length])  # warm-up: allocates for this length
        seconds = []
        for _ in range(PREFILLS):
            decoder.reset()
            seconds.append(timed(prompt[:length])[0])
        found["prefill"][str(length)] = float(np.median(seconds))
        pss.append(_pss())
    decoder.reset()
    _, token = timed(prompt[: min(prompt_lengths)])
    for _ in range(WARM_UP_TOKENS):
        _, token = timed(np.array([token]))
    steps = []
    for _ in range(new_tokens):
        step, token = timed(np.array([token]))
        steps.append(step)
    found["inter_token_ms"] = [1000 * s for s in steps]
    known = [value for value in (*pss, _pss()) if value is not None]
    if known:
        found["peak_pss_bytes"] = max(known)
    if target == "cuda" and (held := gpu_memory()) is not None:
        found["gpu_bytes"] = held
    yield found | memory()


def cold(folder: str, threads: int, target: str = "cpu") -> Iterator[dict[str, Any]]:
    """Seconds to create the session with the artifact's files out of the page cache, or ``reason`` why they could not be."""
    importlib.import_module("onnxruntime")
    files = [p for p in Path(folder).iterdir() if p.is_file()]
    if not hasattr(os, "posix_fadvise"):
        yield {"reason": "this system has no posix_fadvise to drop files from the page cache"}
        return
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages not yet written to the disk would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    before, begun = _read_from_disk(), time.perf_counter()
    Decoder(Path(folder), threads=threads, target=target)
    seconds, after = time.perf_counter() - begun, _read_from_disk()
    weights = sum(p.stat().st_size for p in files if p.name.startswith("model.onnx"))
    if before is None or after is None:
        yield {"reason": "the system does not tell what was read from the disk, so cold cannot be proven"}
    elif after - before < weights / 2:
        yield {"reason": "the files could not be dropped from the page cache here (a file system in memory, or another reader)"}
    else:
        yield {"load_s": seconds}


def bandwidth(threads: int) -> Iterator[dict[str, Any]]:
    """Bytes a second that ``threads`` threads read from memory together (0: one a core), the best of some passes.

    Each thread takes the maximum of its own int32 array: one load and one vector instruction a cache line.
    """
    count = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    arrays = [np.ones(BANDWIDTH_BYTES // 4 // count, dtype=np.int32) for _ in range(count)]
    best = 0.0
    for _ in range(BANDWIDTH_PASSES):
        workers = [threading.Thread(target=np.max, args=(array,)) for array in arrays]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - begun))
    yield {"bytes_per_s": best}


def memory() -> dict[str, int]:
    """Peak resident bytes of this process; what the system does not tell is left out.

    VmHWM, not ru_maxrss: the latter is inherited over exec, so a child of a big process starts with its parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return {"peak_rss_bytes": 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM"))}
    except (OSError, StopIteration):
        if os.name != "posix":
            return {}
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
        return {"peak_rss_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _pss() -> int | None:
    """Proportional set size now; the kernel keeps no peak of it."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
    except (OSError, StopIteration):
        return None


def _read_from_disk() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return None


def _other(kind: str) -> Any:
    """Kinds that need more than the light base are imported only when asked for."""
    return load({"quality": "edgepress.pipeline.bench.evaluate:quality", "tasks": "edgepress.pipeline.bench.tasks:evaluate"}[kind])


def main() -> None:
    """Entry point of the process. An EdgepressError is the last line, as {"error": text}, with exit code 2."""
    kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    # What libraries print must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        measure: Any = {"speed": speed, "cold": cold, "bandwidth": bandwidth}.get(kind) or _other(kind)
        for event in measure(**job):
            print(json.dumps(event), file=answer, flush=True)
    except (EdgepressError, MemoryError) as error:
        print(json.dumps({"error": str(error) or "out of memory"}), file=answer, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
