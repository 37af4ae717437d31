"""Round to nearest: the baseline that every calibrated method must beat. No calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from edgepress.pipeline.checkpoint.packed import LEAST_HALF, PackedLinear, in_half
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.checkpoint.weight_file import let_go
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.job import QuantizeJob
from transformers.pytorch_utils import Conv1D

_ROWS = 4096


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job, rounded in groups along the input."""
    options = job.options
    return {
        name: round_to_nearest(name, weight.numpy(), *job.format(name), options.symmetric)
        for name, weight in progress(job.weights(), "round to nearest", "matrix")
    }


def round_to_nearest(name: str, weight: np.ndarray | torch.Tensor, bits: int, group_size: int, symmetric: bool) -> PackedLinear:
    """Round a float matrix (out, in); the last group may be short, and group_size -1 is one group a row.

    symmetric: scale = absmax / (2^(bits-1) - 1/2), zero point 2^(bits-1), so that both ends of the range lie half
    a step inside the codes. Otherwise scale = (max - min) / (2^bits - 1) over a range that includes 0, which stays exact.
    """
    largest = least_largest_scale(weight, bits)
    if weight.shape[0] <= _ROWS:
        return _rounded(name, weight, bits, group_size, symmetric, largest)
    # rows do not meet, and a whole head in float32 would stand in memory several times
    pieces = [weight[first : first + _ROWS] for first in range(0, len(weight), _ROWS)]
    return PackedLinear.stacked([_rounded(name, piece, bits, group_size, symmetric, largest) for piece in pieces])


def least_largest_scale(weight: np.ndarray | torch.Tensor, bits: int) -> float:
    """What the largest scale of a matrix is at least, if its groups reach as far as their weights."""
    return max(float(weight.max()), -float(weight.min())) / ((1 << bits) - 1)


def _rounded(
    name: str, weight: np.ndarray | torch.Tensor, bits: int, group_size: int, symmetric: bool, largest: float
) -> PackedLinear:
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
    scales = in_half(np.where(scales > 0, scales, LEAST_HALF).astype(np.float32), True, largest)
    if not symmetric:
        zeros = np.clip(np.rint(-low / scales), 0, top).astype(np.uint8)
        offset = zeros[..., None].astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]) + offset, 0, top).astype(np.uint8)
    return PackedLinear.from_codes(name, codes.reshape(rows, -1)[:, :columns], scales, zeros, bits, length)


def matrix_of(module: torch.nn.Linear | Conv1D) -> torch.Tensor:
    """The weight of a linear module as (out, in), float32."""
    weight = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float().contiguous()


@contextmanager
def rounded(
    modules: Mapping[str, torch.nn.Linear | Conv1D],
    forms: Mapping[str, tuple[int, int]],
    symmetric: bool = False,
    stored: ShardIndex | None = None,
) -> Iterator[None]:
    """Within the context the modules in ``forms`` have the weights that rounding to these bits and group sizes leaves.

    stored: the files that the weights came from. What they hold as it is in memory is read again afterwards, not kept: the blocks
    of a whole model need not be in memory twice.
    """
    former: dict[str, torch.Tensor | None] = {}  # None: in the files
    try:
        with torch.no_grad():
            for name in forms:  # all before the first changes, for two modules may share a weight
                module = modules[name]
                former[name] = None if _is_stored(name, module.weight, stored) else module.weight.detach().clone()
                let_go(module.weight)
            for name, (bits, group_size) in forms.items():
                module = modules[name]
                restored = round_to_nearest(name, matrix_of(module).numpy(), bits, group_size, symmetric).dequantized()
                module.weight.copy_(torch.from_numpy(restored.T if isinstance(module, Conv1D) else restored))
                let_go(module.weight)
        yield
    finally:
        with torch.no_grad():
            for name, weight in former.items():
                if weight is None:
                    assert stored is not None
                    weight = stored.tensor(f"{name}.weight")
                modules[name].weight.copy_(weight)
                let_go(modules[name].weight)


def _is_stored(name: str, weight: torch.Tensor, stored: ShardIndex | None) -> bool:
    """Whether these very numbers are in the files under this name: transformers renames and transposes some."""
    file_name = f"{name}.weight"
    if stored is None or file_name not in stored:
        return False
    tensor = stored.tensor(file_name)
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight.dtype), weight)
