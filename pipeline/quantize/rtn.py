"""Round to nearest: the baseline that every calibrated method must beat. No calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.job import QuantizeJob
from transformers.pytorch_utils import Conv1D

_ROWS = 4096


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job, rounded in groups along the input."""
    options = job.options
    return {
        name: round_to_nearest(name, weight.numpy(), job.bits(name), options.group, options.symmetric)
        for name, weight in progress(job.weights(), "round to nearest", "matrix")
    }


def round_to_nearest(name: str, weight: np.ndarray | torch.Tensor, bits: int, group_size: int, symmetric: bool) -> PackedLinear:
    """Round a float matrix (out, in); the last group may be short, and group_size -1 is one group a row.

    symmetric: scale = absmax / (2^(bits-1) - 1/2), zero point 2^(bits-1), so that both ends of the range lie half
    a step inside the codes. Otherwise scale = (max - min) / (2^bits - 1) over a range that includes 0, which stays exact.
    """
    if weight.shape[0] > _ROWS:  # rows do not meet, and a whole head in float32 would stand in memory several times
        pieces = [weight[first : first + _ROWS] for first in range(0, len(weight), _ROWS)]
        parts = [round_to_nearest(name, piece, bits, group_size, symmetric) for piece in pieces]
        arrays = {field: np.concatenate([getattr(part, field) for part in parts]) for field in ("codes", "scales")}
        points = None if symmetric else np.concatenate([part.zeros for part in parts if part.zeros is not None])
        return replace(parts[0], shape=(weight.shape[0], weight.shape[1]), zeros=points, **arrays)
    weight = weight.float().numpy() if isinstance(weight, torch.Tensor) else weight
    rows, columns = weight.shape
    length, group_size = group_size, columns if group_size == -1 else group_size
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), dtype=np.float32)
    padded[:, :columns] = weight
    blocks = padded.reshape(rows, groups, group_size)
    top = (1 << bits) - 1
    if symmetric:
        scales = np.abs(blocks).max(-1) / (top / 2)
        zeros = None
        offset = np.float32(1 << (bits - 1))
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = (high - low) / top
    scales = np.where(scales > 0, scales, 1).astype(np.float32)  # a group of zeros: any scale will do
    if not symmetric:
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
        offset = zeros[..., None].astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]) + offset, 0, top).astype(np.uint8)
    return PackedLinear.from_codes(name, codes.reshape(rows, -1)[:, :columns], scales, zeros, bits, length)


@contextmanager
def rounded(
    modules: dict[str, torch.nn.Linear | Conv1D], bits: int, group_size: int, stored: Checkpoint | None = None
) -> Iterator[None]:
    """Within the context the weights of the modules, by name, are those that rounding to nearest leaves.

    stored: where they came from, and are read again from: the blocks of a whole model need not stand in memory twice.
    """
    again = {name for name in modules if stored is not None and f"{name}.weight" in stored.index}
    kept = {name: module.weight.detach().clone() for name, module in modules.items() if name not in again}
    with torch.no_grad():
        for module in modules.values():
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            restored = round_to_nearest("", weight.detach().contiguous().numpy(), bits, group_size, False).dequantized()
            module.weight.copy_(torch.from_numpy(restored.T if isinstance(module, Conv1D) else restored))
        try:
            yield
        finally:
            for name, module in modules.items():
                module.weight.copy_(stored.index.tensor(f"{name}.weight") if stored and name in again else kept[name])
