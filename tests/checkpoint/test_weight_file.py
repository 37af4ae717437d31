"""Weights in a file: the same numbers, forward and backward, in hardly any memory; and nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.pipeline.checkpoint import weight_file as rooms
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.weight_file import WeightFile, let_go, weight_file
from edgepress.pipeline.errors import OptionError, OutputError
from edgepress.pipeline.machine import MEMORY, WORKING, too_large
from families import family_config

IDS = torch.arange(2, 34)[None]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Any model is too large; returns the cache folder."""
    monkeypatch.setenv(MEMORY, "1")
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def resident(kind: str) -> int:
    """Bytes of this process's memory of a kind, as /proc/self/status calls it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def open_in(folder: Path) -> list[str]:
    """The files of a folder, by inode, that this process has open, those without a name included."""
    found = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    links = [(file, os.readlink(file)) for file in found if file.is_symlink()]
    return [str(os.stat(file).st_ino) for file, target in links if target.startswith(str(folder))]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of a loss by all matrices."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return list(torch.autograd.grad(loss, matrices, allow_unused=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])  # tied ends; transposed matrices; merged experts
def test_a_model_in_a_file_computes_the_same(
    family: str, random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_model(family_config(family), tmp_path / "model")
    usual = Checkpoint(folder).model()
    assert weight_file(usual) is None
    monkeypatch.setenv(MEMORY, "1")
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    model = Checkpoint(folder).model()
    file = weight_file(model)
    assert file is not None and all(file.holds(p) for p in model.parameters())
    assert torch.equal(Blocks(model).logits(IDS), Blocks(usual).logits(IDS))
    for found, expected in zip(gradients(model), gradients(usual), strict=True):
        assert found is expected or torch.equal(found, expected)
    with Blocks(model).without([1]):  # what is skipped is not asked for
        assert not torch.equal(Blocks(model).logits(IDS), Blocks(usual).logits(IDS))


def test_what_is_changed_stays_changed(tiny: Path, little_memory: Path) -> None:
    """Also when it was let go of, and in what runs on it."""
    model = Checkpoint(tiny).model()
    before, head = Blocks(model).logits(IDS), model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(2)
    let_go(head)
    assert torch.equal(Blocks(model).logits(IDS), 2 * before)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_let_go_takes_no_memory(little_memory: Path) -> None:
    file = WeightFile(1 << 26)
    tensor = file.empty((1 << 24,))  # 64 MB
    tensor.fill_(3.0)
    held = resident("RssFile") + resident("RssShmem")
    file.release([tensor, torch.ones(3)])
    assert resident("RssFile") + resident("RssShmem") < held - 60_000_000
    file.fetch([tensor])
    assert float(tensor.sum()) == 3.0 * (1 << 24)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_nothing_is_left_behind(tiny: Path, little_memory: Path) -> None:
    """The file has no name, and its room on the disk ends with the model."""
    model = Checkpoint(tiny).model()
    assert list((little_memory / "weights").iterdir()) == [] and open_in(little_memory)
    del model
    gc.collect()
    assert not open_in(little_memory)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_was_merged_takes_no_room(random_model: Callable[..., Path], tmp_path: Path, little_memory: Path) -> None:
    """Experts become one tensor: their own are not needed any more."""
    model = Checkpoint(random_model(family_config("mixtral"), tmp_path / "model")).model()
    file = weight_file(model)
    assert file is not None and file._size == rooms._SEGMENT and len(set(open_in(little_memory))) == 1
    assert sum(size for _, _, size in file._places.values()) < 4 * model.num_parameters() + 4096 * len(file._places)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_few_files_are_open(little_memory: Path) -> None:
    """A process may have 256 on some systems, and a model has thousands of tensors."""
    import resource

    file, limits = WeightFile(1 << 20), resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/dev/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    try:
        tensors = [file.empty((100,)).fill_(number) for number in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    file.release(tensors)
    assert all(torch.equal(tensor, torch.full((100,), float(number))) for number, tensor in enumerate(tensors))


def test_a_full_disk_is_told_before_it_kills(little_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"GB needed, .* GB free.*EDGEPRESS_CACHE"):
        WeightFile(1 << 60)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"No space left on device.*EDGEPRESS_CACHE"):
        WeightFile(1000).empty((10, 10))


def test_no_folder_for_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write to"):
        WeightFile(1000)


def test_a_budget_that_is_no_number(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY, "6GB")
    with pytest.raises(OptionError, match="takes a number of bytes, not '6GB'"):
        Checkpoint(tiny).model()


def test_weights_and_what_is_beside_them_are_too_large(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Checkpoint(tiny).meta_model().num_parameters()
    needed = 4 * weights + WORKING
    for budget, large in ((needed - 1, True), (needed, False)):
        monkeypatch.setenv(MEMORY, str(budget))
        assert too_large(weights) is large
