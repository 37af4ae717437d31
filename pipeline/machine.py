"""What work takes of this machine: memory given back, and how many logits are made at once."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline.errors import OptionError

if TYPE_CHECKING:
    import torch

WORKING = 500_000_000  # bytes beside the weights: states, logits by rows, what is made of one matrix
MEMORY = "EDGEPRESS_MEMORY"  # in the environment, so that processes which work for this one have it, too: bytes of --memory
_LOGITS = 2**24  # 64 MB in float32: a divergence takes three times that
_IN_CACHE = 2**19  # numbers of which a few arrays stay in the processor's cache
# Of mallopt(3), bytes: an array of this size is given back as soon as it is freed; and where glibc's own bound ends up.
_M_MMAP_THRESHOLD, _LARGE, _LARGEST = -3, 1 << 22, 1 << 25
_threshold = _LARGEST
# bfloat16 is worth its rounding where it is so many times as fast; measured by products of this side, the fastest of some.
_WORTH, _SIDE, _TIMES = 1.2, 512, 6
_FEWEST = 128  # a matrix product of 64 rows takes half as long again a row, and one of fewer still longer


def rows_at_once(vocabulary: int) -> int:
    """Positions whose logits are made at a time: those of a whole window of a large vocabulary would take a gigabyte."""
    return max(_FEWEST, _LOGITS // vocabulary)


def rows_in_cache(vocabulary: int) -> int:
    """Positions of which what is made of their logits stays in the processor's cache, which is two to three times as fast."""
    return max(1, _IN_CACHE // vocabulary)


def peak_memory() -> int | None:
    """Bytes of the largest of this process and those that it started and that ended, None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def available_memory() -> int | None:
    """Bytes that a new process could take without swapping, None where the system does not tell; a container's limit counts."""
    found = [free for free in (_of_the_machine(), *_of_the_groups()) if free is not None]
    return min(found, default=None)


def _of_the_machine() -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with suppress(ImportError):  # which torch's and transformers' companions bring along; an artifact is run without
        import psutil  # type: ignore[import-untyped]

        return int(psutil.virtual_memory().available)
    return None


def _of_the_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int | None]:
    """What the memory limit of each control group (version 2) that this process is in leaves; pages of files are given up."""
    with suppress(OSError, StopIteration):
        group = next(line.partition("::/")[2] for line in own.read_text().splitlines() if line.startswith("0::/"))
        for folder in (root / group, *(root / group).parents):
            with suppress(OSError, ValueError):  # no limit, or none there
                limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
                statistics = dict[str, str]()
                with suppress(OSError):
                    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, limit - used + int(statistics.get("inactive_file", 0)))
            if folder == root:
                return


def memory_budget() -> int | None:
    """Bytes that weights may take: ``--memory``, or half of what is free; None where neither is known.

    Raises OptionError for an environment variable that is no number.
    """
    if given := os.environ.get(MEMORY):
        if not given.isdecimal() or not int(given):
            raise OptionError(f"{MEMORY} in the environment takes a number of bytes, not '{given}'; correct it, or give --memory")
        return int(given)
    free = available_memory()
    return None if free is None else free // 2


def too_large(weights: int) -> bool:
    """Whether so many weights in float32, and what is made of them, are more than the ``memory_budget``."""
    budget = memory_budget()
    return budget is not None and 4 * weights + WORKING > budget


@contextmanager
def working_within(size: int | None) -> Iterator[None]:
    """Within the context ``size`` is the ``memory_budget``, of this process and those that it starts; None leaves it as it is."""
    former = os.environ.get(MEMORY)
    if size is not None:
        os.environ[MEMORY] = str(size)
    try:
        yield
    finally:
        if size is not None:
            os.environ.pop(MEMORY, None)
            os.environ.update({MEMORY: former} if former is not None else {})


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Within the context what is freed in blocks of 4 MB and more goes back to the system at once.

    glibc moves that bound to 32 MB as blocks are freed, and keeps what lies below it: matrices that are read and dropped one after
    the other, between what stays, take twice the memory then (benchmarks/heap_memory.py). New pages cost a sixth of the time.
    """
    global _threshold
    former, _threshold = _threshold, _LARGE
    _set_threshold(_threshold)
    try:
        yield
    finally:
        _threshold = former
        _set_threshold(former)


def _set_threshold(size: int) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def release_memory() -> None:
    """Return free memory to the system: glibc keeps what was freed, and the next stage or process needs it."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefers_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16, and faster than in float32.

    That it can says nothing: an EPYC is faster, a Xeon whose AMX is out of reach slower than in float32.
    """
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported()) and _gain_of_bfloat16() > _WORTH


@cache
def _gain_of_bfloat16() -> float:
    """How many times as fast as in float32 a matrix product is in bfloat16, of the time of one thread: others do not count."""
    import torch

    factors = [torch.ones(_SIDE, _SIDE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    least, threads = [math.inf, math.inf], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_TIMES):
            for which, factor in enumerate(factors):
                begun = time.thread_time()
                torch.nn.functional.linear(factor, factor)
                least[which] = min(least[which], time.thread_time() - begun)
    finally:
        torch.set_num_threads(threads)
    return least[0] / least[1] if least[1] else 1.0  # of a clock that is too coarse


def training_device() -> torch.device:
    """Where models are trained and write text: the GPU that torch sees, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
