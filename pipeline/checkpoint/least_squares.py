"""A block's last matrix, solved for so that the residual stream behind it becomes what it should be: ridge regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.residual import residual_factor
from edgepress.pipeline.errors import ModelError
from transformers.pytorch_utils import Conv1D

Matrix: TypeAlias = torch.nn.Linear | Conv1D | torch.nn.Embedding


@dataclass
class Sums:
    """Sums over tokens. gram: what enters the matrix (in, in). missing: that times what the stream lacks, (in, hidden)."""

    gram: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def empty(cls, width: int, hidden: int, dtype: torch.dtype = torch.float64) -> Sums:
        """Of no token yet."""
        return cls(torch.zeros(width, width, dtype=dtype), torch.zeros(width, hidden, dtype=dtype))

    def add(self, entering: torch.Tensor, missing: torch.Tensor, weights: torch.Tensor) -> None:
        """Add entering (tokens, in), missing (tokens, hidden), weights (tokens, 1) of the tokens."""
        entering = entering * weights
        self.gram += (entering.T @ entering).to(self.gram)
        self.missing += (entering.T @ (missing * weights)).to(self.missing)

    def solved(self, ridge: float) -> torch.Tensor:
        """The change (in, hidden) of least squared error, float64. ridge: times the mean of the Gram matrix's diagonal."""
        gram = self.gram.to(torch.float64, copy=True)  # the sums serve other strengths, too
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # sums in float32 of a text with fewer tokens than inputs may lack a digit
            solution: torch.Tensor = torch.linalg.solve(gram, self.missing.double())
            return solution
        del gram
        solution = torch.cholesky_solve(self.missing.double(), factor)
        return solution


@dataclass(frozen=True)
class Target:
    """The matrix to change, and by what its output is multiplied before it is added to the residual stream."""

    name: str
    matrix: Matrix
    factor: float


def last_matrix(blocks: Blocks, index: int, ids: torch.Tensor, within: str = "") -> Target:
    """The matrix in block ``index`` whose output is added to the residual stream, times a factor.

    Found by trial on ids (1, tokens), not by name: of the matrices to whose output the block's output responds linearly, the one of
    most inputs (in parallel attention there are two). within: the beginning of its name in the block. Raises ModelError when
    there is none.
    """
    block = blocks.modules[index]
    candidates: list[tuple[int, Target]] = []
    with blocks.entering(index, blocks.states(ids, [index])[index]):  # those before it run once
        for name, matrix in block.named_modules():
            if not isinstance(matrix, torch.nn.Linear | Conv1D) or not name.startswith(within) or not matrix.weight.any():
                continue  # a matrix of zeros stands for a part that was removed
            if (factor := residual_factor(blocks, index, matrix, ids)) is not None:
                candidates.append((inputs_of(matrix), Target(f"{blocks.name}.{index}.{name}", matrix, factor)))
    if not candidates:
        kind = type(block).__name__
        raise ModelError(
            f"no single matrix of {kind} is added to the residual stream (its output passes a norm, or experts are mixed)"
        )
    return max(candidates, key=lambda candidate: candidate[0])[1]


def inputs_of(matrix: torch.nn.Linear | Conv1D) -> int:
    """How many features enter a matrix."""
    count: int = matrix.in_features if isinstance(matrix, torch.nn.Linear) else matrix.nx
    return count


def add_to(matrix: torch.nn.Linear | Conv1D, change: torch.Tensor) -> None:
    """Add a change (in, out) to a matrix's weight in place."""
    with torch.no_grad():
        matrix.weight.add_((change if isinstance(matrix, Conv1D) else change.T).to(matrix.weight))
