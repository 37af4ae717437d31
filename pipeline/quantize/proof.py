"""Proofs of the quantize stage: what was written reads back the same, and a calibrated method's codes restore its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.rtn import round_to_nearest

# GPTQ trades error in the weights for error in the outputs, but not much: 1.0 to 1.5 times that of round-to-nearest on real
# models. Zero points that are off by one, the fault to be caught, make it 3.4 times at any width, a wrong order more.
WORST_ERROR = 2.5
_ROWS_PROVEN = 256  # of each matrix, at least, where it has so many: rounding all would take a tenth of GPTQ's own time


def prove_written(linears: dict[str, PackedLinear], out: Path) -> None:
    """Read back what was written; raise ProofError unless every array is the quantizer's."""
    file = PackedFile(out)
    for name, linear in linears.items():
        again = file[name]
        for part in ("codes", "scales", "zeros", "permutation"):
            a, b = getattr(again, part), getattr(linear, part)
            if not (a is b is None or (a is not None and b is not None and np.array_equal(a, b))):
                raise ProofError(f"{name} reads back differently from what was written; check the disk and quantize again")


def prove_errors(job: QuantizeJob, linears: dict[str, PackedLinear]) -> dict[str, float]:
    """Relative error of each matrix: ||dequantized - weight|| / ||weight|| (Frobenius).

    Raises ProofError for codes of a calibrated method that restore a matrix far worse than rounding does: they were read the
    wrong way. Our own GPTQ, which moves a matrix before it is rounded, checks its codes by that more closely.
    """
    errors: dict[str, float] = {}
    for name, tensor in job.weights():
        weight, linear = tensor.numpy(), linears[name]
        errors[name] = round(_distance(linear.dequantized(), weight), 5)
        if (moved := METHODS[job.options.method].moved) is not None:
            check_codes(linear, tensor, *job.format(name), job.options.symmetric, moved)
    return errors


def check_codes(
    linear: PackedLinear, weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, moved: float = 0.0
) -> None:
    """Raise ProofError for codes that restore some rows of a matrix far worse than rounding does: a wrong reading spares none.

    moved: how far from the weight the codes may be besides, a share of its norm.
    """
    some = slice(None, None, max(1, len(weight) // _ROWS_PROVEN))
    expected = weight[some].float().numpy()
    rounded = round_to_nearest(linear.name, expected, bits, group_size, symmetric).dequantized()
    error, least = _distance(linear.rows(some).dequantized(), expected), _distance(rounded, expected)
    if not error <= WORST_ERROR * least + moved + 1e-5:
        raise ProofError(
            f"{linear.name} was quantized with an error of {error:.3g}, and rounding to nearest would lose {least:.3g}; give more "
            "--calibration-tokens or use --method rtn, and report this"
        )


def _distance(restored: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(restored - weight)) / (float(np.linalg.norm(weight)) or 1.0)
