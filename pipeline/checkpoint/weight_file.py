"""Weights that do not fit into memory: float32 in a file without a name, mapped, so that the system keeps what of it fits.

Everything works on such weights as on any, changes and gradients included, and gives the same numbers. What a block needs is asked
for ahead of it, and let go behind it.
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, block_output, decoder_blocks
from edgepress.pipeline.errors import ModelError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.machine import memory_budget, release_memory, too_large
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
_SEGMENT, _PIECE = 1 << 28, 1 << 24  # bytes that are mapped at once, for each takes a file descriptor; and written at once


class WeightFile:
    """Room for tensors in a file that is gone with the last of them. Raises OutputError where the disk has no such room."""

    def __init__(self, size: int) -> None:
        """size: bytes that will be asked for, about."""
        release_memory()  # of a model that nobody needs any more, and of its file
        self._folder = _folder()
        with self._told():
            if (free := shutil.disk_usage(self._folder).free) < size:
                raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="edgepress-weights-")  # noqa: SIM115 (as long as this object)
        self._size = 0  # of the file
        self._map: mmap.mmap | None = None  # of its last segment, and how many bytes of that are taken
        self._taken = 0
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}  # data_ptr -> the segment, first byte there, and bytes

    def empty(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in the file, of zeros."""
        shape = tuple(shape)
        count = math.prod(shape)
        if not (size := _pages(count * dtype.itemsize)):
            return torch.empty(shape, dtype=dtype)
        if self._map is None or self._taken + size > len(self._map):
            self._map, self._taken = self._segment(max(size, _SEGMENT)), 0
        place = self._map, self._taken, size
        tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._taken).view(shape)
        self._taken += size
        self._places[tensor.data_ptr()] = place
        return tensor

    def put(self, tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A copy of a tensor in the file; it takes no memory of this process until it is used."""
        copy = self.empty(tensor.shape, dtype).copy_(tensor)
        self.release([copy])
        return copy

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of those that ``empty`` gave."""
        return tensor.data_ptr() in self._places

    def fetch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Have the system read these from the disk, unless they are in memory, while something else is done."""
        self._advise("MADV_WILLNEED", tensors)

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are not needed now: they take no memory of this process, until they are used again. Nothing is lost."""
        self._advise("MADV_DONTNEED", tensors)

    def _advise(self, advice: str, tensors: Iterable[torch.Tensor]) -> None:
        if (number := getattr(mmap, advice, None)) is None:  # Windows sees to it by itself
            return
        if torch.compiler.is_exporting():  # the portable graph is traced on tensors that lie nowhere
            return
        for tensor in tensors:
            if (place := self._places.get(tensor.data_ptr())) is not None:
                segment, first, size = place
                segment.madvise(number, first, size)

    def _segment(self, size: int) -> mmap.mmap:
        """So many bytes more of the file, which the disk has: one that fills later would kill the process."""
        with self._told():
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._size, size)
            else:
                self._file.seek(self._size)
                for first in range(0, size, _PIECE):
                    self._file.write(bytes(min(_PIECE, size - first)))
                self._file.flush()
            found = mmap.mmap(self._file.fileno(), size, offset=self._size)
        self._size += size
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the system within the context say what to do."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot keep weights that do not fit into memory in {self._folder} ({error.strerror}); free some disk space, let "
                "EDGEPRESS_CACHE name a folder on another disk, or raise --memory"
            ) from error


def _pages(size: int) -> int:
    """Bytes that ``size`` bytes take of a file in whole pages."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def file_for(weights: int) -> WeightFile | None:
    """A file for so many weights in float32 where they are more than memory may hold, which a line says; else None."""
    if not too_large(weights):
        return None
    _say(4 * weights)
    return WeightFile(4 * weights)


@cache
def _say(needed: int) -> None:
    """Once of a model, though every stage opens it."""
    log.info(
        "memory: %.1f GB of weights in float32 do not fit into %.1f GB (--memory, or half of what is free); they lie in %s",
        needed / 1e9, (memory_budget() or 0) / 1e9, cache_folder() / "weights",
    )  # fmt: skip


def weight_file(model: PreTrainedModel) -> WeightFile | None:
    """The file that holds the weights of a model, None for one whose weights are in memory."""
    return _FILES.get(model)


def let_go(*tensors: torch.Tensor) -> None:
    """``WeightFile.release`` of those that lie in any file; weights that are in memory stay."""
    for file in set(_FILES.values()):
        file.release(tensors)


def watch(model: PreTrainedModel, file: WeightFile) -> None:
    """Move what of a model's weights is not in the file there, and see to it that blocks are fetched and released."""
    for parameter in model.parameters():
        if not file.holds(parameter):  # made by transformers of several others
            parameter.data = file.put(parameter.data)
    _FILES[model] = file
    try:
        _, blocks = decoder_blocks(model)
    except ModelError:
        return
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        hooks = _Hooks(file, following)
        block.register_forward_pre_hook(hooks.before)
        block.register_forward_hook(hooks.behind)


class _Hooks:
    """What is done with a block's weights before and behind its work, forward and backward."""

    def __init__(self, file: WeightFile, following: torch.nn.Module | None) -> None:
        """following: the next block. The block itself is not kept: it keeps these, and would not be freed at once."""
        self._file, self._following = file, following

    def before(self, block: torch.nn.Module, args: BlockArgs) -> None:
        """Forward."""
        for needed in (block, self._following):
            if needed is not None and "forward" not in needed.__dict__:  # one that is skipped needs nothing
                self._file.fetch(_of(needed))

    def behind(self, block: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
        """Forward."""
        self._file.release(_of(block))
        if (hidden := block_output(output)).requires_grad:
            hidden.register_hook(partial(self._backward, block))

    def _backward(self, block: torch.nn.Module, gradient: torch.Tensor) -> None:
        """The blocks behind are done, and this one's turn has come."""
        if self._following is not None:
            self._file.release(_of(self._following))
        self._file.fetch(_of(block))


def _of(block: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What may lie in a file: codes that are trained around are buffers."""
    yield from block.parameters()
    yield from block.buffers()


_FILES: WeakKeyDictionary[PreTrainedModel, WeightFile] = WeakKeyDictionary()


def _folder() -> Path:
    """Where such files lie: not in the system's folder for temporary files, which is memory on many machines."""
    folder = cache_folder() / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder} ({error.strerror}), where weights that do not fit into memory are kept; let EDGEPRESS_CACHE "
            "name a folder on a large disk"
        ) from error
    return folder
