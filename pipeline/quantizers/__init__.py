"""One quantizer a file, each ``Job -> {name: PackedLinear}``; the table of them is in pipeline/quantize.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint import read_tensors
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.options import QuantizeOptions


@dataclass(frozen=True)
class Job:
    """What a quantizer is given: the checkpoint folder, the matrices to quantize, and calibration windows.

    linears: full name -> (out, in). windows: called only by quantizers that calibrate.
    """

    folder: Path
    linears: dict[str, tuple[int, int]]
    windows: Callable[[], list[np.ndarray]]
    options: QuantizeOptions

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, float32 torch tensor (out, in)) of every matrix, one at a time."""
        for name, tensor in read_tensors(self.folder):
            if name.removesuffix(".weight") in self.linears:
                if not torch.isfinite(tensor).all():
                    raise ModelError(f"{name} holds NaN or Inf; the checkpoint is broken there, fetch it again")
                yield name.removesuffix(".weight"), tensor.float()
