"""The weights of a checkpoint folder by name, read when asked for: the one place that knows which are float and which packed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.importers.reader import open_quantized
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear, PackedMatrices
from edgepress.pipeline.checkpoint.shards import PACKED, ShardIndex
from edgepress.pipeline.files import JsonObject


def open_packed(folder: Path, index: ShardIndex, original: Path | None = None) -> PackedMatrices | None:
    """The packed matrices of a folder, ours or third-party; None for a float one.

    original: float original of a third-party GPTQ checkpoint with ambiguous zero points. Raises ModelError.
    """
    if (folder / PACKED).is_file():
        return PackedFile(folder)
    if original is None:
        return open_quantized(folder, index)
    return open_quantized(folder, index, _Original(original))


class _Original:
    """Module name -> float32 matrix (out, in) of a float checkpoint, None for a module that it lacks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _index(self) -> ShardIndex:
        return ShardIndex.of(self._folder)

    def __call__(self, module: str) -> np.ndarray | None:
        name = f"{module}.weight"
        return self._index.tensor(name).float().numpy() if name in self._index else None


class Weights:
    """Name -> array of a folder with float weights and perhaps packed matrices, ours or third-party.

    original: float original of a third-party GPTQ checkpoint with ambiguous zero points. index: where the float tensors lie.
    imported: what is known of a folder that another library quantized; None for ours and for float ones. leaves_head_float:
    whether its library never packs the head. Raises ModelError for files that are damaged or cannot be read.
    """

    def __init__(self, folder: Path, original: Path | None = None, index: ShardIndex | None = None) -> None:
        self.folder, self.index = folder, index or ShardIndex.of(folder)
        packed = open_packed(folder, self.index, original)
        self._packed: Mapping[str, PackedLinear] = {} if packed is None else packed
        self._parts: Mapping[str, str] = {} if packed is None else packed.parts
        self._codes = frozenset() if packed is None else packed.codes
        self._modules = frozenset(self._packed)
        self._floats = frozenset(self.index.names - self._parts.keys())
        self._parameters: AbstractSet[str] = self.names
        self.imported: JsonObject | None = None if packed is None else packed.described
        self.leaves_head_float = packed is not None and packed.leaves_head_float

    def without(self, unused: AbstractSet[str], parameters: AbstractSet[str] | None = None) -> Weights:
        """These weights without some of their ``names``. parameters: the names in which NaN and Inf count; default: all."""
        other = copy.copy(self)
        other._floats = self._floats - unused
        other._modules = frozenset(module for module in self._modules if f"{module}.weight" not in unused)
        other._parameters = other.names if parameters is None else parameters
        return other

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._floats or name.removesuffix(".weight") in self._modules)

    @property
    def matrices(self) -> set[str]:
        """The linear modules whose matrices are packed."""
        return set(self._modules)

    @property
    def names(self) -> set[str]:
        """Names of all weights, packed ones as ``....weight``."""
        return {*self._floats, *(f"{module}.weight" for module in self._modules)}

    @property
    def stored(self) -> set[str]:
        """Names in the files of the float tensors that are part of these weights, the parts of packed matrices among them."""
        return {*self._floats, *(part for part, module in self._parts.items() if module in self._modules)}

    def array(self, name: str) -> np.ndarray:
        """A float tensor as float32; bfloat16 and float16 widen exactly."""
        array: np.ndarray = self.index.tensor(name).float().numpy()
        return array

    def packed(self, module: str) -> PackedLinear | None:
        """The packed matrix of a linear module, None where it is float."""
        if module not in self._modules:
            return None
        return self._packed[module]

    def matrix(self, module: str) -> PackedLinear | np.ndarray:
        """The matrix of a linear module or embedding: packed, or float32 (out, in)."""
        packed = self.packed(module)
        return self.array(f"{module}.weight") if packed is None else packed

    def tensor(self, name: str) -> torch.Tensor:
        """A weight in float32, dequantized where it is packed: then (out, in), whatever way round the module stores it."""
        module = name.removesuffix(".weight")
        # Not by way of ``packed`` or ``matrix``, which the exporters read: a fault in those must show in the proof.
        return torch.from_numpy(self._packed[module].dequantized() if module in self._modules else self.array(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``tensor(name)``."""
        packed = self.packed(name.removesuffix(".weight"))
        return self.index[name].shape if packed is None else packed.shape

    def floats(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The float weights in their stored types, file by file. Raises ModelError for NaN and Inf, also in packed matrices.

        They count in parameters and in scales. Buffers may hold them (a mask is -inf), and codes stored under a float type.
        """
        counts = {name for name in self.stored if self._parts.get(name, "") in self._modules or name in self._parameters}
        for name, tensor in self.index.tensors(self.stored, counts - self._codes):
            if name in self._floats:
                yield name, tensor
