"""Weights that do not fit into memory: float32 in a file without a name, mapped, so that the system keeps what of it fits.

Everything works on such weights as on any, changes and gradients included, and gives the same numbers. What a block needs is asked
for ahead of it, and let go behind it.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, block_output, decoder_blocks
from edgepress.pipeline.errors import ModelError, OutputError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import check_disk
from edgepress.pipeline.machine import memory_budget
from transformers import PreTrainedModel

WORKING = 500_000_000  # bytes beside the weights: states, logits by rows, what is made of one matrix


class WeightFile:
    """Room for tensors in a file that is gone with the last of them. Raises OutputError where the disk has no such room."""

    def __init__(self, size: int) -> None:
        """size: bytes that will be asked for, about."""
        self._folder = _folder()
        check_disk(self._folder, size)
        with self._told():
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="edgepress-weights-")  # noqa: SIM115 (as long as this object)
        self._end = 0
        self._maps: dict[int, mmap.mmap] = {}  # data_ptr -> where it lies

    def empty(self, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor in the file, of zeros."""
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        with self._told():
            if hasattr(os, "posix_fallocate"):  # a disk that fills later would kill the process
                os.posix_fallocate(self._file.fileno(), self._end, size)
            else:
                self._file.truncate(self._end + size)
            found = mmap.mmap(self._file.fileno(), size, offset=self._end)
        self._end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        tensor = torch.frombuffer(found, dtype=dtype).view(shape)
        self._maps[tensor.data_ptr()] = found
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is one of those that ``empty`` gave."""
        return tensor.data_ptr() in self._maps

    def fetch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Have the system read these from the disk, unless they are in memory, while something else is done."""
        self._advise("MADV_WILLNEED", tensors)

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are not needed now: they take no memory of this process, until they are used again. Nothing is lost."""
        self._advise("MADV_DONTNEED", tensors)

    def _advise(self, advice: str, tensors: Iterable[torch.Tensor]) -> None:
        if (number := getattr(mmap, advice, None)) is None:  # Windows sees to it by itself
            return
        for tensor in tensors:
            if (found := self._maps.get(tensor.data_ptr())) is not None:
                found.madvise(number)

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


def too_large(model: PreTrainedModel) -> bool:
    """Whether the float32 weights of a model, on any device, are more than the memory that work may take."""
    budget = memory_budget()
    return budget is not None and 4 * model.num_parameters() + WORKING > budget


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
            parameter.data = file.empty(parameter.shape).copy_(parameter.data)
    _FILES[model] = file
    try:
        _, blocks = decoder_blocks(model)
    except ModelError:
        return
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        _Hooks(file, block, following)


class _Hooks:
    """What is done with a block's weights before and behind its work, forward and backward."""

    def __init__(self, file: WeightFile, block: torch.nn.Module, following: torch.nn.Module | None) -> None:
        self._file, self._block, self._following = file, block, following
        block.register_forward_pre_hook(self._before)
        block.register_forward_hook(self._behind)

    def _before(self, *_: object) -> None:
        for block in (self._block, self._following):
            if block is not None and "forward" not in block.__dict__:  # one that is skipped needs nothing
                self._file.fetch(block.parameters())

    def _behind(self, module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
        self._file.release(self._block.parameters())
        if (hidden := block_output(output)).requires_grad:
            hidden.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        """The blocks behind are done, and this one's turn has come."""
        if self._following is not None:
            self._file.release(self._following.parameters())
        self._file.fetch(self._block.parameters())


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
