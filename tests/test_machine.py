"""Memory: what is given back, and what there is; and in which type the processor multiplies faster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edgepress.pipeline import machine

_CHILD = """
import ctypes, resource, sys
from edgepress.pipeline import machine

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

given_back = machine.large_blocks_given_back()  # until the end
if sys.argv[1] == "yes":
    given_back.__enter__()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
free(malloc(30 << 20))  # from now on glibc takes what is smaller from its heap
blocks = []
for _ in range(20):
    blocks.append(malloc(8 << 20))
    ctypes.memset(blocks[-1], 1, 8 << 20)
    malloc(100 << 10)  # stays
for block in blocks[:-1]:
    free(block)
print(resident() // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_go_back_to_the_system() -> None:
    """Between blocks that stay glibc keeps what was freed: 160 MB here."""
    kept, given_back = (int(subprocess.check_output([sys.executable, "-c", _CHILD, word])) for word in ("no", "yes"))
    assert given_back < kept - 100


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    """Of all groups around a process the narrowest counts; one without a limit says max."""
    own, inner = tmp_path / "own", tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    for folder, limit, used in ((inner, "max", 5), (inner.parent, "1000", 700)):
        for name, value in (("memory.max", limit), ("memory.current", used), ("memory.stat", "anon 1\ninactive_file 100")):
            (folder / name).write_text(f"{value}\n")
    assert list(machine._of_the_groups(tmp_path, own)) == [400]
    own.write_text("0::/\n")
    assert list(machine._of_the_groups(tmp_path, own)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_available_memory_is_a_part_of_all_there_is() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.01 * total < (machine.available_memory() or 0) <= total


@pytest.mark.parametrize(("gain", "preferred"), [(2.0, True), (1.0, False), (0.6, False)])
def test_bfloat16_where_it_is_faster(gain: float, preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has it may still take longer: it is measured, on one thread, by the time that this takes."""
    now, threads = 0.0, torch.get_num_threads()

    def multiply(matrix: torch.Tensor, other: torch.Tensor) -> None:
        nonlocal now
        assert torch.get_num_threads() == 1
        now += 1.0 if matrix.dtype == torch.float32 else 1 / gain

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "linear", multiply)
    monkeypatch.setattr(machine.time, "thread_time", lambda: now)
    machine._gain_of_bfloat16.cache_clear()
    try:
        assert machine.prefers_bfloat16() == preferred and torch.get_num_threads() == threads
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert not machine.prefers_bfloat16()
    finally:
        machine._gain_of_bfloat16.cache_clear()
