"""Healing in closed form: the last matrix before a gap learns, by ridge regression, to write what the removed run wrote.

After ReplaceMe (Shopkhoev et al. 2025, section 3): there a map T multiplies the MLP's output M before the gap so that
||M T + Y - L|| is least, Y the residual stream beside it and L the output of the removed run, and is folded into the down
projection. Here the change of the down projection is solved for directly on the activations that enter it, of which M T is a
special case (T mixes what the matrix gives; the matrix itself is given anew), with three further differences: gaps are
closed in order and each is fitted on the stream that the model healed so far really has, so that a later one corrects
what earlier ones left; every token counts by 1 / ||L||^2, for a few tokens have states a hundred times as long; and the
strength of the ridge is the one of least loss on text kept for that.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.heal.job import Gap, HealJob
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
# Times the mean of the Gram matrix's diagonal.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def heal(job: HealJob) -> dict[str, Any]:
    """Close every gap of ``job`` that can be; returns, for each, the matrix changed and the ridge, or why not."""
    facts: dict[str, Any] = {}
    for gap in job.gaps:
        where = f"before layer {gap.target}"
        try:
            facts[where] = _close(job, gap)
        except ModelError as error:
            facts[where] = {"not_healed": str(error)}
            advice = "" if "lora" in job.options.healer else "; --healer lora may"
            log.warning("warning: linear cannot close the gap %s: %s%s", where, error, advice)
    return facts


def _close(job: HealJob, gap: Gap) -> dict[str, Any]:
    blocks = job.student
    name, matrix, factor = (
        _last_matrix(blocks, gap.before, job.windows[0]) if gap.before >= 0 else _embedding(blocks, job.windows[0])
    )
    gram, cross = _statistics(job, gap, matrix)
    weight: torch.Tensor = matrix.weight.detach().clone()
    bias = None if getattr(matrix, "bias", None) is None else matrix.bias.detach().clone()
    losses = {0.0: job.loss()}
    solutions = {0.0: torch.zeros_like(cross)}
    for ridge in RIDGES:
        solutions[ridge] = _solve(gram, cross, ridge) / factor
        _set(matrix, weight, bias, solutions[ridge])
        losses[ridge] = job.loss()
    best = min(losses, key=lambda ridge: losses[ridge])
    _set(matrix, weight, bias, solutions[best])
    log.info("heal: %s, ridge %g: loss on text kept for that %.4f -> %.4f", name, best, losses[0.0], losses[best])
    return {"matrix": name, "ridge": best, "losses": {f"{ridge:g}": round(loss, 6) for ridge, loss in losses.items()}}


def _set(matrix: Any, weight: torch.Tensor, bias: torch.Tensor | None, change: torch.Tensor) -> None:
    """Add a change (in [+ 1], out) to a matrix; the last row, where there is one more than inputs, to its bias."""
    inputs = change.shape[0] - (bias is not None)
    with torch.no_grad():
        if isinstance(matrix, torch.nn.Embedding):  # the map is of what the table gives: E + E change
            matrix.weight.copy_(weight + weight @ change.float())
            return
        turned = change[:inputs].float()
        matrix.weight.copy_(weight + (turned if isinstance(matrix, Conv1D) else turned.T))
        if bias is not None:
            matrix.bias.copy_(bias + change[-1].float())


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """(G + ridge * mean diagonal) X = C, float64."""
    strength = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution: torch.Tensor = torch.linalg.solve(gram + strength, cross)
    return solution


def _statistics(job: HealJob, gap: Gap, matrix: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums X^T X (in, in) and X^T (L - out) (in, hidden) in float64, batch by batch: memory does not grow with the text.

    X: what enters the matrix, with a column of ones where it has a bias. out: what leaves the block now.
    """
    blocks, place = job.student, gap.before + 1
    target, starts = job.teacher[gap.target], job.starts()
    constant = getattr(matrix, "bias", None) is not None
    gram, cross, seen, row = torch.zeros(()), torch.zeros(()), [], 0
    handle = matrix.register_forward_hook(
        lambda _, args, output: seen.append(output if isinstance(matrix, torch.nn.Embedding) else args[0])
    )
    try:
        for ids, real in progress(batches(blocks.model, job.windows), "statistics", "batch"):
            seen.clear()
            states = blocks.states(ids, [place])[place]
            wanted = torch.from_numpy(np.array(target[starts[row] : starts[row + len(ids)]]))
            entering, leaving = seen[0].reshape(*real.shape, -1)[real].float(), states[real].float()
            if constant:
                entering = torch.cat([entering, torch.ones(len(entering), 1)], dim=1)
            weights = 1 / wanted.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            entering, missing = entering * weights, (wanted - leaving) * weights
            gram, cross = gram + (entering.T @ entering).double(), cross + (entering.T @ missing).double()
            row += len(ids)
    finally:
        handle.remove()
    return gram, cross


def _last_matrix(blocks: Blocks, place: int, window: np.ndarray) -> tuple[str, Any, float]:
    """Name, module and factor of the matrix in block ``place`` whose output is added to the residual stream, times the factor.

    Found by trial, not by name: of the matrices to whose output the block's output answers linearly, the one of most inputs (in
    parallel attention there are two). Raises ModelError when there is none.
    """
    block, ids = blocks.modules[place], torch.from_numpy(window[:32])[None]
    found: list[tuple[int, str, torch.nn.Module, float]] = []
    for name, matrix in block.named_modules():
        if not isinstance(matrix, torch.nn.Linear | Conv1D):
            continue
        plain, own = _outputs(blocks, place, matrix, ids, 0.0)
        changed, _ = _outputs(blocks, place, matrix, ids, 0.5)
        difference = changed - plain
        if own.shape != plain.shape:
            continue
        factor = float((difference * own).sum() / (own * own).sum() / 0.5)
        error = (difference - 0.5 * factor * own).norm() / (0.5 * own).norm()
        if abs(factor) > 1e-3 and float(error) < 1e-3 * abs(factor):
            inputs = matrix.in_features if isinstance(matrix, torch.nn.Linear) else matrix.nx
            found.append((inputs, f"{blocks.name}.{place}.{name}", matrix, factor))
    if not found:
        kind = type(block).__name__
        raise ModelError(
            f"no single matrix of {kind} is added to the residual stream (its output passes a norm, or experts are mixed)"
        )
    return max(found, key=lambda one: one[0])[1:]


def _outputs(
    blocks: Blocks, place: int, matrix: torch.nn.Module, ids: torch.Tensor, more: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the block when the matrix gives (1 + more) times its output, and that output."""
    own: list[torch.Tensor] = []

    def scale(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):  # a router gives more than its product
            return output
        own.append(output)
        return output * (1 + more)

    handle = matrix.register_forward_hook(scale)
    try:
        leaving = blocks.states(ids, [place + 1])[place + 1]
    finally:
        handle.remove()
    return leaving, own[0].reshape(leaving.shape) if own and own[0].numel() == leaving.numel() else torch.zeros(())


def _embedding(blocks: Blocks, window: np.ndarray) -> tuple[str, Any, float]:
    """The embedding, for a gap at the very beginning. Raises ModelError where it is tied or not all that enters the blocks."""
    model, ids = blocks.model, torch.from_numpy(window[:32])[None]
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise ModelError("the removed run begins at layer 0 and the embedding, which stands before it, is tied to the head")
    given: list[torch.Tensor] = []  # some tables scale what they give, some models scale it after them
    handle = table.register_forward_hook(lambda _, args, output: given.append(output))
    try:
        entering, rows = blocks.states(ids, [0])[0], given[0]
    finally:
        handle.remove()
    if entering.shape != rows.shape:
        raise ModelError("the removed run begins at layer 0 and its input is not the embedding's output")
    factor = float((entering * rows).sum() / (rows * rows).sum())
    if float((entering - factor * rows).norm()) > 1e-3 * float(entering.norm()):
        raise ModelError("the removed run begins at layer 0 and more than the embedding enters it (positions)")
    name = next(name for name, module in model.named_modules() if module is table)
    return name, table, factor
