"""One measurement in a process that does nothing else: speed and memory of an artifact need numpy, onnxruntime and its files alone.

python -m edgepress.pipeline.bench.worker KIND JOB.json      (what bench starts; prints JSON objects, one a line)
"""

from __future__ import annotations

import importlib
import json
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from edgepress.pipeline.bench.jobs import (
    Bandwidth,
    BandwidthJob,
    ColdJob,
    ColdSample,
    QualityJob,
    SpeedJob,
    SpeedSample,
    TaskNames,
    TaskNamesJob,
    TasksJob,
)
from edgepress.pipeline.bench.memory import peak_rss, pss
from edgepress.pipeline.documents import typed
from edgepress.pipeline.errors import EdgepressError
from edgepress.pipeline.files import JsonObject, files_below, graph_files, read_json
from edgepress.pipeline.machine import cores
from edgepress.pipeline.registry import require
from edgepress.pipeline.report.plain import object_of
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.targets import gpu_memory

if TYPE_CHECKING:
    from edgepress.pipeline.bench.torch_decoder import TorchDecoder

WARM_UP_TOKENS = 8
PREFILLS = 3  # of each prompt in one process; their median is its sample
BANDWIDTH_BYTES = 1 << 28  # larger than the caches of all but a few servers
BANDWIDTH_PASSES = 5


def speed(job: SpeedJob) -> Iterator[SpeedSample]:
    """One sample of each figure.

    Times are wall clock. The first token's time is the prefill of the whole prompt and its argmax; warm-up is not counted.
    Logits come back to the host, so no clock is read before the device is done. Raises WorkerError for a disturbed original.
    """
    load = _loader(job)  # before the clock: loading is the model's time, not the library's
    begun = time.perf_counter()
    decoder = load()
    load_s = time.perf_counter() - begun
    loaded, own = time.perf_counter(), time.thread_time()
    prompt, prefill = np.array(job.ids, dtype=np.int64), {}
    sizes = [pss()]
    for length in job.prompt_lengths:
        decoder.reset()
        _timed(decoder, prompt[:length])  # warm-up: allocates for this length
        seconds = []
        for _ in range(PREFILLS):
            decoder.reset()
            seconds.append(_timed(decoder, prompt[:length])[0])
        prefill[str(length)] = float(np.median(seconds))
        sizes.append(pss())
    steps = _decode(decoder, prompt[: min(job.prompt_lengths)], job.new_tokens)
    if job.dtype is not None:
        from edgepress.pipeline.bench.torch_decoder import check_undisturbed

        check_undisturbed((time.thread_time() - own) / (time.perf_counter() - loaded))
    yield SpeedSample(
        load_s=load_s,
        prefill=prefill,
        inter_token_ms=tuple(1000 * s for s in steps),
        values={
            "memory.peak_rss_bytes": peak_rss(),
            "memory.peak_pss_bytes": max((value for value in (*sizes, pss()) if value is not None), default=None),
            "memory.gpu_bytes": gpu_memory() if job.target == "cuda" else None,
        },
    )


def _loader(job: SpeedJob) -> Callable[[], Decoder | TorchDecoder]:
    """What loads the model of a job; its libraries are loaded."""
    if job.dtype is None:
        importlib.import_module("onnxruntime")
        return partial(Decoder, Path(job.folder), threads=job.threads, target=job.target)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # onnxruntime heeds neither: both have the same threads
        os.environ.pop(name, None)
    from edgepress.pipeline.bench.torch_decoder import loader

    return loader(job)


def _timed(decoder: Decoder | TorchDecoder, ids: np.ndarray) -> tuple[float, int]:
    """Seconds of one step, and the most likely next token."""
    start = time.perf_counter()
    token = int(decoder.feed(ids)[-1].argmax())
    return time.perf_counter() - start, token


def _decode(decoder: Decoder | TorchDecoder, prompt: np.ndarray, count: int) -> list[float]:
    """Seconds of each of ``count`` greedy steps after the prompt and the warm-up."""
    decoder.reset()
    _, token = _timed(decoder, prompt)
    for _ in range(WARM_UP_TOKENS):
        _, token = _timed(decoder, np.array([token]))
    steps = []
    for _ in range(count):
        step, token = _timed(decoder, np.array([token]))
        steps.append(step)
    return steps


def cold(job: ColdJob) -> Iterator[ColdSample]:
    """Seconds to create the session with the artifact's files out of the page cache, or the reason why they could not be."""
    importlib.import_module("onnxruntime")
    files = list(files_below(Path(job.folder)))
    if not hasattr(os, "posix_fadvise"):
        yield ColdSample(reason="this system has no posix_fadvise to drop files from the page cache")
        return
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages not yet written to the disk would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    before, begun = _read_from_disk(), time.perf_counter()
    Decoder(Path(job.folder), threads=job.threads, target=job.target)
    seconds, after = time.perf_counter() - begun, _read_from_disk()
    weights = sum(p.stat().st_size for p in graph_files(Path(job.folder)))
    if before is None or after is None:
        yield ColdSample(reason="the system does not report what was read from the disk, so a cold load cannot be proven")
    elif after - before < weights / 2:
        reason = "the files could not be dropped from the page cache here (a file system in memory, or another reader)"
        yield ColdSample(reason=reason)
    else:
        yield ColdSample(load_s=seconds)


def bandwidth(job: BandwidthJob) -> Iterator[Bandwidth]:
    """Bytes a second that the threads read from memory together, the best of some passes.

    Each thread takes the maximum of its own int32 array: one load and one vector instruction a cache line.
    """
    count = job.threads or cores()
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
    yield Bandwidth(best)


def _read_from_disk() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return None


def _quality(job: QualityJob) -> Iterator[object]:
    from edgepress.pipeline.bench.evaluate import quality

    return quality(job)


def _tasks(job: TasksJob) -> Iterator[object]:
    require("lm_eval")
    from edgepress.pipeline.bench.tasks import evaluate

    return evaluate(job)


def _task_names(job: TaskNamesJob) -> Iterator[object]:
    require("lm_eval")
    from edgepress.pipeline.bench.tasks import check_names

    check_names(job.tasks, job.with_files)
    yield TaskNames(job.tasks)


def answers(kind: str, job: JsonObject) -> Iterator[object]:
    """Run a job. Kinds that need more than the light base are imported only when they are asked for."""
    if kind == "speed":
        return speed(typed(SpeedJob, job))
    if kind == "cold":
        return cold(typed(ColdJob, job))
    if kind == "bandwidth":
        return bandwidth(typed(BandwidthJob, job))
    if kind == "quality":
        return _quality(typed(QualityJob, job))
    if kind == "task_names":
        return _task_names(typed(TaskNamesJob, job))
    return _tasks(typed(TasksJob, job))


def _end_with_parent() -> None:
    """End this process with the one that started it, however that ends: no one would read the answer, and it may take long.

    That one holds the other end of the pipe that is standard input here. Waiting for its end takes no time from what is measured.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Entry point of the process. An EdgepressError is the last line, as {"error": text}, with exit code 2."""
    _end_with_parent()
    kind, job = sys.argv[1], read_json(Path(sys.argv[2]))
    # What libraries print must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for event in answers(kind, job):
            print(json.dumps(object_of(event)), file=answer, flush=True)
    except (EdgepressError, MemoryError) as error:
        print(json.dumps({"error": str(error) or "out of memory"}), file=answer, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
