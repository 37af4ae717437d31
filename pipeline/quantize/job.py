"""What a quantizer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.weights import read_tensors
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.options import QuantizeOptions


@dataclass(frozen=True)
class QuantizeJob:
    """What a quantizer is given: the checkpoint folder, the matrices to quantize, and calibration windows.

    linears: full name -> (out, in). windows: called only by quantizers that calibrate. scratch: a folder that a quantizer
    may make beside the output, and clears away when done; what is left there by an interrupted run is its own to resume.
    exceptions: bits of the matrices that have others than ``options.bits``. kept_float: matrices of the blocks that stay float.
    transposed: those stored as (in, out).
    """

    folder: Path
    linears: dict[str, tuple[int, int]]
    windows: Callable[[], list[np.ndarray]]
    options: QuantizeOptions
    scratch: Path
    exceptions: dict[str, int] = field(default_factory=dict)
    kept_float: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    def bits(self, name: str) -> int:
        """Bits of one matrix."""
        return self.exceptions.get(name, self.options.weight_bits)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, float32 torch tensor (out, in)) of every matrix, one at a time."""
        for name, tensor in read_tensors(self.folder):
            if name.removesuffix(".weight") in self.linears:
                if not torch.isfinite(tensor).all():
                    raise ModelError(f"{name} holds NaN or Inf; the checkpoint is broken there, fetch it again")
                module = name.removesuffix(".weight")
                yield module, (tensor.T if module in self.transposed else tensor).float().contiguous()
