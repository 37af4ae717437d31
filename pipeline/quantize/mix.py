"""Bits by measurement: a format for every matrix, so that the bytes are least at a bound of loss, or the loss at a bound of bytes.

An integer program, the multiple-choice knapsack problem (Kellerer et al. 2004, chapter 11), solved by HiGHS through scipy.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from edgepress.pipeline.checkpoint.packed import SCALE_BYTES
from edgepress.pipeline.checkpoint.planes import PLANES, file_bytes, operator_bits
from edgepress.pipeline.checkpoint.weight_file import let_go
from edgepress.pipeline.quantize.curvature import Errors
from edgepress.pipeline.quantize.rtn import matrix_of, round_to_nearest

_GAP = 1e-3  # of the optimum: what HiGHS may leave unproven
_SECONDS = 20.0
_PLANE = 250  # bytes in the graph, of which three planes take 0.6 kB with the nodes that join them, and five 1.0
_ROWS = 256  # of a matrix, at least, that its rounding error is estimated from


class Form(NamedTuple):
    """How a matrix is stored."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits}/{self.group_size}"


BASE = Form(4, 64)  # of the rounding whose cost is measured; that of others follows from their squared error
EIGHT = Form(8, 64)
HEAD_GROUP = EIGHT.group_size  # of the head beside a mix: at 8 bits shorter blocks win next to nothing
FORMS = (Form(2, 32), Form(2, 64), Form(3, 64), Form(4, 32), BASE, Form(4, 128), Form(5, 64), Form(6, 64), EIGHT)
NATIVE = tuple(form for form in FORMS if form.bits not in PLANES)  # an operator computes with what the file has
CHOICES = {False: FORMS, True: NATIVE}  # by ``native_bits``


@dataclass(frozen=True)
class Item:
    """Matrices that share a form: those that read one input, for they share one operator too.

    costs: KL divergence of each form, nats a token. bytes: of each form: codes, scales and zero points, and what
    planes take in the graph.
    """

    names: tuple[str, ...]
    weights: int
    costs: Mapping[Form, float]
    bytes: Mapping[Form, int]


def items_of(errors: Errors, costs: Mapping[str, float], together: Iterable[Sequence[str]]) -> list[Item]:
    """What there is to choose from. costs: of ``BASE``, by matrix. together: names of matrices that read one input."""
    items = []
    for names in together:
        ratios = {name: _squared_errors(errors, name) for name in names}
        shapes = [matrix_of(errors.modules[name]).shape for name in names]
        items.append(
            Item(
                tuple(names),
                sum(rows * columns for rows, columns in shapes),
                {form: sum(costs[name] * ratios[name][form] for name in names) for form in FORMS},
                {
                    form: graph_bytes(form) + sum(bytes_of(rows, columns, form, errors.symmetric) for rows, columns in shapes)
                    for form in FORMS
                },
            )
        )
    return items


def _squared_errors(errors: Errors, name: str) -> dict[Form, float]:
    """The squared rounding error of each form as a multiple of that of ``BASE``."""
    weight = matrix_of(errors.modules[name])
    some = weight[:: max(1, len(weight) // _ROWS)].numpy().copy()
    let_go(errors.modules[name].weight)
    rounded = {form: round_to_nearest(name, some, *form, errors.symmetric).dequantized() for form in FORMS}
    squares = {form: float(np.square(restored - some).sum()) for form, restored in rounded.items()}
    return {form: square / (squares[BASE] or 1.0) for form, square in squares.items()}


def bytes_of(rows: int, columns: int, form: Form, symmetric: bool) -> int:
    """Of codes, scales and zero points, as ``PackedLinear.nbytes`` counts them.

    A symmetric matrix has no zero points, but where the operator has other bits: none means another point to it.
    """
    groups, bits = -(-columns // form.group_size), operator_bits(form.bits)
    zeros = 0 if symmetric and form.bits not in PLANES else rows * -(-groups * bits // 8)
    codes = rows * groups * form.group_size * bits // 8
    return file_bytes(codes, form.bits) + file_bytes(zeros, form.bits) + SCALE_BYTES * rows * groups


def graph_bytes(form: Form) -> int:
    """What an operator whose codes lie in planes has in the graph more than another: planes and nodes, by name; as measured."""
    return _PLANE * PLANES[form.bits].number if form.bits in PLANES else 0


def solve(items: Sequence[Item], forms: Sequence[Form], *, cost: float | None = None, size: float | None = None) -> list[Form]:
    """The form of each item: fewest bytes with costs that sum to at most ``cost``, or least cost in at most ``size`` bytes.

    Where nothing keeps to the bound, the cheapest by it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    costs, sizes = (np.array([[table[form] for form in forms] for table in tables]) for tables in (
        [item.costs for item in items], [item.bytes for item in items]
    ))  # fmt: skip
    bounded, bound, wanted = (costs, cost, sizes) if cost is not None else (sizes, size, costs)
    assert bound is not None
    least = bounded.min(1).sum()
    if least > bound:
        return [forms[index] for index in bounded.argmin(1)]
    count, width = costs.shape
    once = np.kron(np.eye(count), np.ones(width))
    scale = wanted.max()
    with _nothing_printed():
        result = milp(
            (wanted / scale).ravel(),
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(bounded.ravel()[None] / bound, -np.inf, 1)],
            bounds=Bounds(0, 1),
            integrality=np.ones(costs.size),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if result.x is None:  # out of time before any answer
        return [forms[index] for index in bounded.argmin(1)]
    return [forms[index] for index in result.x.reshape(count, width).argmax(1)]


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Within the context, what native code writes to standard output goes nowhere: HiGHS has lines that no option turns off."""
    _flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Both buffers of standard output: Python's, and the C library's, which holds what native code wrote to a pipe or a file."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, TypeError, AttributeError):  # no C library under that name
        ctypes.CDLL(None).fflush(None)


def rules_of(forms: Mapping[str, Form], usual: Form) -> tuple[str, ...]:
    """``bits_for`` rules that give every matrix its form, short ones: one for a kind of matrix and a form, its blocks listed."""
    blocks: dict[tuple[str, str, Form], list[str]] = defaultdict(list)
    for name, form in forms.items():
        if form != usual:
            before, index, after = re.split(r"\.(\d+)\.", name, maxsplit=1)
            blocks[before, after, form].append(index)
    return tuple(
        f"{re.escape(before)}.({'|'.join(indices)}).{re.escape(after)}={form}".replace("\\.", ".")
        for (before, after, form), indices in blocks.items()
    )


def by_matrix(items: Sequence[Item], forms: Sequence[Form]) -> dict[str, Form]:
    """The form of each matrix, by name."""
    return {name: form for item, form in zip(items, forms, strict=True) for name in item.names}


def mean_bits(items: Sequence[Item], forms: Sequence[Form]) -> float:
    """Bits a weight, scales and zero points counted."""
    return 8 * sum(item.bytes[form] for item, form in zip(items, forms, strict=True)) / sum(item.weights for item in items)


def usual_form(forms: Sequence[Form], items: Sequence[Item]) -> Form:
    """What ``bits`` and ``group_size`` say of a mix: of the forms with blocks as long as the head's, that of most weights.

    Those two hold for all that ``bits_for`` does not name, so for the head's blocks, too.
    """
    weights: dict[Form, int] = {BASE: 0}
    for item, form in zip(items, forms, strict=True):
        if form.group_size == HEAD_GROUP:
            weights[form] = weights.get(form, 0) + item.weights
    return max(weights, key=lambda form: weights[form])
