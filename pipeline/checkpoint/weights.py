"""The weights of a checkpoint folder by name, read when asked for: float tensors and packed matrices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.checkpoint.importers.bnb import BnbFolder
from edgepress.pipeline.checkpoint.importers.gptq import GptqFolder
from edgepress.pipeline.checkpoint.importers.reader import open_quantized
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.shards import PACKED, header, shards
from edgepress.pipeline.checkpoint.tensors import Tensors
from edgepress.pipeline.errors import ModelError


def open_packed(folder: Path, original: Path | None = None) -> PackedFile | GptqFolder | BnbFolder | None:
    """The packed matrices of a folder, ours or another's; None for a float one.

    original: the float checkpoint that another's was made from, to tell what its values leave open. Raises ModelError.
    """
    if (folder / PACKED).is_file():
        return PackedFile(folder)

    def weight(name: str) -> np.ndarray | None:
        tensor = None if original is None else read_tensor(original, f"{name}.weight")
        return None if tensor is None else tensor.float().numpy()

    return open_quantized(folder, shards(folder), None if original is None else weight)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every float tensor of a checkpoint, shard by shard. Raises ModelError for a damaged file."""
    for shard in shards(folder):
        tensors = Tensors([shard])
        for name in sorted(tensors.names):
            tensor = tensors[name]
            if tensor.is_floating_point() and not torch.isfinite(tensor.float().sum(dtype=torch.float64)):
                raise ModelError(f"{name} in {shard} holds NaN or Inf; the checkpoint is broken there, fetch it again")
            yield name, tensor


def read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    """One tensor of a checkpoint, None where it has no such name."""
    for shard in shards(folder):
        if name in header(shard)[0]:
            return Tensors([shard])[name]
    return None


class Weights:
    """Name -> array, of a folder with float weights and perhaps packed matrices, ours or another's.

    original: the float checkpoint that another's was made from, where it is at hand.
    """

    def __init__(self, folder: Path, original: Path | None = None) -> None:
        self._tensors = Tensors(shards(folder))
        self._packed = open_packed(folder, original)
        self._floats = self._tensors.names - (self._packed.parts if self._packed is not None else set())

    @property
    def imported(self) -> dict[str, Any] | None:
        """What is known of a folder that others quantized; None for ours and for float ones."""
        return getattr(self._packed, "described", None)

    def __contains__(self, name: str) -> bool:
        return name in self._floats or (self._packed is not None and name.removesuffix(".weight") in self._packed)

    @property
    def matrices(self) -> set[str]:
        """The linear modules whose matrices are packed."""
        return set(self._packed or ())

    @property
    def names(self) -> set[str]:
        """Names of all weights, packed ones as ``....weight``."""
        return self._floats | {f"{name}.weight" for name in self._packed or ()}

    def array(self, name: str) -> np.ndarray:
        """A float tensor as float32; bfloat16 and float16 widen exactly."""
        array: np.ndarray = self._tensors[name].float().numpy()
        return array

    def packed(self, module: str) -> PackedLinear | None:
        """The packed matrix of a linear module, None where it is float."""
        return self._packed[module] if self._packed is not None and module in self._packed else None
