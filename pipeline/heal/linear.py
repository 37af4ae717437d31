"""Healing in closed form: the last matrix before a gap learns, by ridge regression, to write what the removed run wrote.

After ReplaceMe (Shopkhoev et al. 2025, section 3): there a map T multiplies the MLP's output M before the gap so that
||M T + Y - L|| is least, Y the residual stream that it is added to and L the output of the removed run, and is folded into the
down projection. Here the change of the down projection is solved for directly on the activations that enter it, of which M T is a
special case (T mixes the matrix's outputs; here every entry of the matrix is free), with three further differences: gaps are
closed in order and each is fitted on the stream that the model healed so far really has, so that a later one corrects
what earlier ones left; every token is weighted by 1 / ||L||^2, because a few tokens have states a hundred times as long; and
the strength of the ridge is chosen by loss on text set aside for that.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, Blocks
from edgepress.pipeline.checkpoint.least_squares import Matrix, Sums, Target, last_matrix
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.heal.job import Gap, HealJob
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
# Times the mean of the Gram matrix's diagonal.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class _Closed:
    """A gap that was closed; losses: ridge -> loss on the selection texts, nats a token, with "0" for no change."""

    matrix: str
    ridge: float
    losses: dict[str, float]


def heal(job: HealJob) -> JsonObject:
    """Close every gap of ``job`` that can be; returns, for each, the matrix changed and the ridge, or why not."""
    facts: JsonObject = {}
    for gap in job.gaps:
        where = f"before layer {gap.target}"
        try:
            facts[where] = asdict(_close(job, gap))
        except ModelError as error:
            facts[where] = {"not_healed": str(error)}
            advice = "" if "lora" in job.options.healer else "; --healer lora may"
            log.warning("warning: linear cannot close the gap %s: %s%s", where, error, advice)
    return facts


def _close(job: HealJob, gap: Gap) -> _Closed:
    """Solve for each ridge, and leave the matrix with the solution of least loss. Raises ModelError without such a matrix."""
    blocks, window = job.student, job.windows[0]
    target = _embedding(blocks, window) if gap.before < 0 else last_matrix(blocks, gap.before, torch.from_numpy(window[:32])[None])
    matrix = target.matrix
    sums = _statistics(job, gap, matrix)
    weight: torch.Tensor = matrix.weight.detach().clone()
    bias = _bias(matrix)
    losses = {0.0: job.loss()}
    best, solution = 0.0, torch.zeros(sums.missing.shape)
    for ridge in RIDGES:
        found = (sums.solved(ridge) / target.factor).float()
        _set(matrix, weight, bias, found)
        losses[ridge] = job.loss()
        if losses[ridge] < losses[best]:
            best, solution = ridge, found
    _set(matrix, weight, bias, solution)
    log.info("heal: %s, ridge %g: loss on selection texts %.4f -> %.4f", target.name, best, losses[0.0], losses[best])
    return _Closed(target.name, best, {f"{ridge:g}": round(loss, 6) for ridge, loss in losses.items()})


def _bias(matrix: Matrix) -> torch.Tensor | None:
    """A copy of the matrix's bias, None where it has none."""
    bias: torch.Tensor | None = getattr(matrix, "bias", None)
    return None if bias is None else bias.detach().clone()


def _set(matrix: Matrix, weight: torch.Tensor, bias: torch.Tensor | None, change: torch.Tensor) -> None:
    """Set a matrix to ``weight`` and ``bias`` plus a change (in [+ 1], out), whose last row is the bias's where there is one."""
    change = change.float()
    inputs = change.shape[0] - (bias is not None)
    with torch.no_grad():
        if isinstance(matrix, torch.nn.Embedding):  # the map is of the table's output: E + E change
            matrix.weight.copy_(weight + weight @ change)
            return
        added = change[:inputs]
        matrix.weight.copy_(weight + (added if isinstance(matrix, Conv1D) else added.T))
        if bias is not None:
            matrix.bias.copy_(bias + change[-1])


def _statistics(job: HealJob, gap: Gap, matrix: Matrix) -> Sums:
    """Sums over all tokens, batch by batch: memory does not grow with the text.

    What enters the matrix has a column of ones where that has a bias; the stream lacks what left the removed run, less what leaves
    the block now.
    """
    blocks, index = job.student, gap.before + 1
    teacher, starts = job.teacher[gap.target], job.starts()
    constant = getattr(matrix, "bias", None) is not None
    sums, seen, row = None, list[torch.Tensor](), 0

    def see(module: torch.nn.Module, args: BlockArgs, output: torch.Tensor) -> None:
        seen.append(output if isinstance(matrix, torch.nn.Embedding) else args[0])

    handle = matrix.register_forward_hook(see)
    try:
        for ids, real in progress(batches(blocks.model, job.windows), "statistics", "batch"):
            seen.clear()
            states = blocks.states(ids, [index])[index]
            target = torch.from_numpy(np.array(teacher[starts[row] : starts[row + len(ids)]]))
            entering, leaving = seen[0].reshape(*real.shape, -1)[real].float(), states[real].float()
            if constant:
                entering = torch.cat([entering, torch.ones(len(entering), 1)], dim=1)
            weights = 1 / target.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            sums = sums or Sums.empty(entering.shape[1], target.shape[1])
            sums.add(entering, target - leaving, weights)
            row += len(ids)
    finally:
        handle.remove()
    assert sums is not None
    return sums


def _embedding(blocks: Blocks, window: np.ndarray) -> Target:
    """The embedding, for a gap at the very beginning. Raises ModelError where it is tied or not all that enters the blocks."""
    model, ids = blocks.model, torch.from_numpy(window[:32])[None]
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise ModelError("the removed run begins at layer 0 and the embedding, which precedes it, is tied to the head")
    outputs: list[torch.Tensor] = []  # some tables scale their output, some models scale it after them
    handle = table.register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        entering, rows = blocks.states(ids, [0])[0], outputs[0]
    finally:
        handle.remove()
    if entering.shape != rows.shape:
        raise ModelError("the removed run begins at layer 0 and its input is not the embedding's output")
    factor = float((entering * rows).sum() / (rows * rows).sum())
    if float((entering - factor * rows).norm()) > 1e-3 * float(entering.norm()):
        raise ModelError("the removed run begins at layer 0 and more than the embedding enters it (positions)")
    name = next(name for name, module in model.named_modules() if module is table)
    return Target(name, table, factor)
