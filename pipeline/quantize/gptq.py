"""GPTQ (Frantar et al. 2022): each matrix is rounded column by column, and what a column loses the later ones make up for.

Blocks are taken in order, one in memory at a time. Within a block, matrices that read one input share one Hessian, and each reads
what the matrices before it, already quantized, make of the calibration text. Before it is rounded it is moved towards what
would make of that what the original makes of its own input (``inputs.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.packed import LEAST_HALF, SCALE_BYTES, PackedFile, PackedLinear, in_half
from edgepress.pipeline.checkpoint.stream import TOKENS, Stream
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, remove
from edgepress.pipeline.machine import prefers_bfloat16, release_memory
from edgepress.pipeline.quantize import inputs
from edgepress.pipeline.quantize.inputs import DAMPING, JUDGING, LONGEST, MOVED, Input, Linear, inverse_factor
from edgepress.pipeline.quantize.isolated import Begun, report_begun, report_progress
from edgepress.pipeline.quantize.job import QuantizeJob, chosen_rows, taken_up
from edgepress.pipeline.quantize.proof import check_codes
from edgepress.pipeline.quantize.rtn import least_largest_scale, matrix_of, round_to_nearest
from edgepress.pipeline.quantize.settled import settled
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
# Of a group's range, what its scale may cover: a step that is smaller for all weights is often worth cutting off the largest.
SHARES = tuple(1 - 0.05 * step for step in range(8))
COLUMNS = 128  # that change one another at once; the columns after them follow in one product (section 3.3, step 2)
ROWS = 16384  # of the head at a time
LOSSLESS = 8  # bits at which rounding the head loses next to nothing
STATES = "states.safetensors"  # in the scratch folder: how far the stream came


# --- one matrix


def quantized(
    name: str,
    weight: torch.Tensor,
    factor: torch.Tensor,
    order: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    permuted: bool = False,
    largest: float | None = None,
) -> PackedLinear:
    """A matrix (out, in), float32, rounded by GPTQ (algorithm 1; blocks end where groups do, so that a scale fits what it rounds).

    order: in which its columns are rounded, (in,). factor: of ``inverse_factor``, of the Hessian in that order. A group's scale and
    zero point are found once all columns before it are rounded. permuted: groups lie along the order, which is stored (act-order);
    otherwise it must be one of ``group_order``. largest: ``least_largest_scale`` of the matrix of which these are some rows.
    """
    rows, columns = weight.shape
    largest = least_largest_scale(weight, bits) if largest is None else largest
    length = columns if group_size == -1 else group_size
    left = weight[:, order].T.contiguous()  # a column lies in one piece
    codes = torch.empty((columns, rows), dtype=torch.uint8)
    found, costs = [], factor.diagonal().square().reciprocal()
    top, size = (1 << bits) - 1, min(length, COLUMNS)
    for first in range(0, columns, size):
        if first % length == 0:
            scale, zero = _grid(left[first : first + length], costs[first : first + length], bits, symmetric, largest)
            found.append((scale, zero))
        part, block = left[first : first + size], factor[first : first + size, first : first + size]
        errors = torch.empty_like(part)
        for column, row in enumerate(part):
            code = (row / scale).round_().add_(zero).clamp_(0, top)
            codes[first + column] = code
            error = torch.sub(row, code.sub_(zero).mul_(scale), out=errors[column]).div_(block[column, column])
            part[column:].addr_(block[column, column:], error, alpha=-1)
        left[first + size :].addmm_(factor[first : first + size, first + size :].T, errors, alpha=-1)
    scales, zeros = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    if not permuted:  # back to where they were
        groups = (order[::length] // length).argsort()
        codes, scales, zeros = codes[order.argsort()], scales[:, groups], zeros[:, groups]
    points = None if symmetric else zeros.byte().numpy()
    permutation = order.int().numpy() if permuted else None
    return PackedLinear.from_codes(name, codes.T.contiguous().numpy(), scales.numpy(), points, bits, group_size, permutation)


def group_order(diagonal: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns by what enters them, the greatest first, (in,), but whole groups one after another: a short one comes last.

    What is rounded early can be made up for by most others. Act-order's gain at no price, for groups stay as they are (Gafni et al.
    2025, group-aware reordering). diagonal: of the Hessian.
    """
    length = len(diagonal) if group_size == -1 else group_size
    whole = len(diagonal) // length * length
    groups = diagonal[:whole].view(-1, length)
    within = groups.argsort(dim=1, descending=True, stable=True) + length * torch.arange(len(groups))[:, None]
    short = diagonal[whole:].argsort(descending=True, stable=True) + whole
    return torch.cat([within[groups.amax(1).argsort(descending=True, stable=True)].flatten(), short])


def _grid(part: torch.Tensor, costs: torch.Tensor, bits: int, symmetric: bool, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row of a group (columns, rows): of ranges cut at both ends, the one that loses least.

    costs: of a column's squared error, (columns,): what equation 1 of the paper has for it. largest: see ``in_half``.
    """
    top = (1 << bits) - 1
    if symmetric:
        high = part.abs().amax(0)
        low = -high
    else:
        low, high = part.amin(0).clamp_max_(0), part.amax(0).clamp_min_(0)
    least = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for share in SHARES:
        scale = (high - low).mul_(share / top)
        scale = torch.from_numpy(in_half(torch.where(scale > 0, scale, float(LEAST_HALF)).numpy(), largest=largest))
        zero = torch.full_like(scale, 1 << (bits - 1)) if symmetric else (-share * low / scale).round_().clamp_(0, top)
        code = (part / scale).round_().add_(zero).clamp_(0, top)
        error = code.sub_(zero).mul_(scale).sub_(part).square_().T @ costs
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


# --- all of them


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows, and a head of few bits.

    What is finished of it lies in ``job.scratch``, a folder a block: the same job goes on after the last finished block.
    """
    windows = job.windows()
    settings = _settings(job, [row.tolist() for row in windows])
    stream = (taken_up(job, settings, "torch", "transformers") and _resumed(job, windows)) or Stream(job.checkpoint, windows)
    because = "" if stream.resumable else " (the blocks of this model share keys and values, which are not kept)"
    report_begun(Begun(len(job.linears), STATES, because))
    blocks = len(stream)
    for index in range(stream.done):
        report_progress(len(PackedFile(_folder(job.scratch, index))))
    while stream.done < blocks:
        report_progress(0, f"block {stream.done + 1} of {blocks}")
        folder = _folder(job.scratch, stream.done)
        with stream.block() as block, settled(stream) as settle:
            found = {linear.name: linear for linear in _of_block(job, stream, block, settle)}
            stream.advance()
        remove(folder)
        folder.mkdir()
        packed.save(found, folder)
        if stream.resumable:
            stream.keep(job.scratch / STATES)
        del found  # they lie in the folder: those of all blocks are not needed in memory before the end
    head = _head(job, stream) if job.head is not None and job.head[1] < LOSSLESS else {}
    del stream
    release_memory()
    return head | {name: linear for index in range(blocks) for name, linear in PackedFile(_folder(job.scratch, index)).items()}


def _resumed(job: QuantizeJob, windows: list[np.ndarray]) -> Stream | None:
    """The stream as an interrupted run left it, None where it left none or what it left is damaged."""
    if not (job.scratch / STATES).is_file():
        return None
    try:
        stream = Stream(job.checkpoint, windows)
        stream.resume(job.scratch / STATES)
        for index in range(stream.done):
            for _ in PackedFile(_folder(job.scratch, index)).values():  # reads it
                pass
    except ModelError as error:
        log.info("quantize: GPTQ starts over: %s", error)
        return None
    log.info("quantize: GPTQ goes on after block %d of %d, where it was interrupted", stream.done, len(stream))
    return stream


def _settings(job: QuantizeJob, windows: list[list[int]]) -> JsonObject:
    options = job.options
    return {
        "forms": {name: list(job.format(name)) for name in job.linears},
        "symmetric": options.symmetric,
        "act_order": options.act_order,
        "by": [DAMPING, LONGEST, MOVED, JUDGING, list(SHARES), COLUMNS, TOKENS, SCALE_BYTES, prefers_bfloat16()],
        "windows": windows,
    }


def _folder(scratch: Path, index: int) -> Path:
    return scratch / f"block-{index:03d}"


def _of_block(
    job: QuantizeJob, stream: Stream, block: torch.nn.Module, settle: Callable[[torch.nn.Module], None]
) -> Iterator[PackedLinear]:
    """The matrices of the block that is in memory, each of which becomes what its codes stand for before the next is looked at."""
    prefix = f"{stream.name}.{stream.done}"
    modules = {f"{prefix}.{name}": module for name, module in block.named_modules() if f"{prefix}.{name}" in job.linears}
    rest = set(modules)
    originals = inputs.originals(stream, modules)
    for step in inputs.steps(stream, modules):
        read = inputs.read(stream, {name: modules[name] for name in step.names}, originals, step.single)
        while read:
            for linear in _solved(job, modules, read.pop(0)):
                rest.remove(linear.name)
                yield _placed(modules[linear.name], linear)
                if step.single:
                    settle(modules[linear.name])
    if rest:
        log.info("quantize: nothing is seen to enter %s and %d more: rounded to nearest", min(rest), len(rest) - 1)
    for name in sorted(rest):
        linear = round_to_nearest(name, matrix_of(modules[name]), *job.format(name), job.options.symmetric)
        yield _placed(modules[name], linear)


def _solved(job: QuantizeJob, modules: Mapping[str, Linear], read: Input) -> Iterator[PackedLinear]:
    """Matrices that read one input. Raises ProofError for codes that do not restore what they were made of."""
    by_activation, diagonal = job.options.act_order, read.hessian.diagonal()
    kinds: dict[int, list[str]] = {}
    for name in read.names:
        kinds.setdefault(0 if by_activation else job.format(name)[1], []).append(name)
    for group_size, alike in kinds.items():
        order = group_order(diagonal, -1 if by_activation else group_size)
        factor = inverse_factor(read.hessian[order][:, order])
        for name in alike:
            weight = read.aim(name, matrix_of(modules[name]), factor, order)
            linear = quantized(name, weight, factor, order, *job.format(name), job.options.symmetric, by_activation)
            check_codes(linear, weight, *job.format(name), job.options.symmetric)
            yield linear


def _head(job: QuantizeJob, stream: Stream) -> dict[str, PackedLinear]:
    """The output head by what leaves the last block and its norm; some rows at a time, which do not meet."""
    assert job.head is not None
    name, bits, group_size = job.head
    weight = job.checkpoint.tensor(f"{name}.weight")
    assert weight is not None
    weight = chosen_rows(weight, job.head_rows)
    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    for rows in stream.read_by(stream.model.get_output_embeddings()):
        inputs.add_gram(hessian, rows.float())
    inputs.mirror(hessian)
    order = group_order(hessian.diagonal(), group_size)
    factor = inverse_factor(hessian[order][:, order])
    pieces = (weight[first : first + ROWS].float() for first in range(0, len(weight), ROWS))
    largest = least_largest_scale(weight, bits)
    head = PackedLinear.stacked([quantized(name, piece, factor, order, bits, group_size, largest=largest) for piece in pieces])
    check_codes(head, weight, bits, group_size, symmetric=False)
    return {name: head}


def _placed(module: Linear, linear: PackedLinear) -> PackedLinear:
    """Give the module the weights that its codes stand for."""
    weight = torch.from_numpy(linear.dequantized())
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    report_progress(1)
    return linear
