"""The weights of a checkpoint folder by name, read when asked for: float tensors and packed matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.checkpoint import open_packed, shards
from edgepress.pipeline.importers.tensors import Tensors
from edgepress.pipeline.packed import PackedLinear


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
