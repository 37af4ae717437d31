"""How a block's output depends on one of its matrices: found by trial, so that no architecture need be named."""

from __future__ import annotations

import torch
from edgepress.pipeline.checkpoint.blocks import Blocks


def residual_factor(blocks: Blocks, index: int, matrix: torch.nn.Module, ids: torch.Tensor) -> float | None:
    """By what the output of ``matrix`` is multiplied before it is added to what leaves block ``index``.

    None where what leaves the block does not respond linearly to it: the output passes a norm, or is not called. ids: (1, tokens).
    """
    plain, output = _outputs(blocks, index, matrix, ids, 0.0)
    changed, _ = _outputs(blocks, index, matrix, ids, 0.5)
    if output.shape != plain.shape:
        return None
    difference = changed - plain
    factor = float((difference * output).sum() / (output * output).sum() / 0.5)
    error = (difference - 0.5 * factor * output).norm() / (0.5 * output).norm()
    return factor if abs(factor) > 1e-3 and float(error) < 1e-3 * abs(factor) else None


def _outputs(
    blocks: Blocks, index: int, matrix: torch.nn.Module, ids: torch.Tensor, more: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the block when the matrix's output is multiplied by 1 + more, and that output before."""
    outputs: list[torch.Tensor] = []

    def scale(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> object:
        if not isinstance(output, torch.Tensor):  # a router returns more than its product
            return output
        outputs.append(output)
        return output * (1 + more)

    handle = matrix.register_forward_hook(scale)
    try:
        leaving = blocks.states(ids, [index + 1])[index + 1]
    finally:
        handle.remove()
    same_size = bool(outputs) and outputs[0].numel() == leaving.numel()
    return leaving, outputs[0].reshape(leaving.shape) if same_size else torch.zeros(())
