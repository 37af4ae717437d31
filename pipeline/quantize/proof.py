"""Proofs of the quantize stage: what was written reads back the same, and a calibrated method's codes restore its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
    wrong way.
    """
    errors: dict[str, float] = {}
    for name, tensor in job.weights():
        weight, linear = tensor.numpy(), linears[name]
        restored = linear.dequantized()
        errors[name] = round(_distance(restored, weight), 5)
        if METHODS[job.options.method].calibrated:
            some = slice(None, None, max(1, len(weight) // _ROWS_PROVEN))  # a wrong reading spares no row
            rounded = round_to_nearest(name, weight[some], *job.format(name), job.options.symmetric).dequantized()
            error, least = _distance(restored[some], weight[some]), _distance(rounded, weight[some])
            if not error <= WORST_ERROR * least + 1e-5:
                raise ProofError(
                    f"{name} came back from {job.options.method} with an error of {error:.3g}, and rounding to nearest would lose "
                    f"{least:.3g}; give more --calibration-tokens or use --method rtn, and report this"
                )
    if job.head is not None and (head := linears.get(job.head[0])) is not None:
        _check_head(job, head)
    return errors


def _check_head(job: QuantizeJob, linear: PackedLinear) -> None:
    """The same of a head that the quantizer returned, which may be the embedding, too: of some rows, for it has many."""
    weight = job.checkpoint.tensor(f"{linear.name}.weight")
    assert weight is not None
    some = slice(None, None, max(1, len(weight) // _ROWS_PROVEN))
    rounded = round_to_nearest(linear.name, weight[some].float(), linear.bits, linear.group_size, symmetric=False).dequantized()
    error, least = (_distance(restored, weight[some].float().numpy()) for restored in (linear.dequantized()[some], rounded))
    if not error <= WORST_ERROR * least + 1e-5:
        raise ProofError(f"{linear.name} came back with an error of {error:.3g}, and rounding would lose {least:.3g}; report this")


def _distance(restored: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(restored - weight)) / (float(np.linalg.norm(weight)) or 1.0)
