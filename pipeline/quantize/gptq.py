"""GPTQ (Frantar et al. 2022): each matrix is rounded column by column, and what a column loses the later ones make up for.

Blocks are taken in order, one in memory at a time. Within a block, matrices that read one input share one Hessian, and each reads
what the matrices before it, already quantized, make of the calibration text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.blocks import BlockArgs
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.stream import Stream
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.files import JsonObject, read_json, remove, sha256, write_json
from edgepress.pipeline.quantize.isolated import Begun, report_begun, report_progress
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.rtn import matrix_of, round_to_nearest
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
DAMPING = 0.05  # of the mean of the Hessian's diagonal, added to it; the paper has 0.01, gptqmodel 0.05
STATES, JOB = "states.safetensors", "job.json"  # in the scratch folder: how far the stream came, and of which job
Linear = torch.nn.Linear | Conv1D


# --- one matrix


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U of which U'U is the inverse of the Hessian (in, in), damped as far as it must be.

    Section 3.3, step 3. Not by way of the inverse: with H = MM' and M upper triangular, which is the Cholesky factor of H read from
    its end, U is the inverse of M. Raises ModelError for NaN and Inf.
    """
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise ModelError("the calibration text makes numbers that are not finite in the model; the checkpoint is broken")
    reversed_ = hessian.flip(0, 1)
    step = DAMPING * reversed_.diagonal().mean()
    while True:
        reversed_.diagonal().add_(step)
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not failed:
            break
        step *= 2
    del reversed_
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(upper))
    return torch.linalg.solve_triangular(upper, identity, upper=True, out=identity)


def quantized(
    name: str,
    weight: torch.Tensor,
    factor: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    order: torch.Tensor | None = None,
) -> PackedLinear:
    """A matrix (out, in), float32, rounded by GPTQ (algorithm 1; a block is a group, so that its scale fits what it rounds).

    factor: of ``inverse_factor``, in the order of the columns. order: of the columns, (in,), which is stored (act-order); None as
    they are. A scale is that of round-to-nearest of the group as it is once all columns before it are rounded.
    """
    rows, columns = weight.shape
    length = columns if group_size == -1 else group_size
    left = (weight if order is None else weight[:, order]).T.contiguous()  # a column lies in one piece
    codes = torch.empty((columns, rows), dtype=torch.uint8)
    scales, zeros = [], []
    top = (1 << bits) - 1
    for first in range(0, columns, length):
        part, block = left[first : first + length], factor[first : first + length, first : first + length]
        grid = round_to_nearest(name, part.T.contiguous().numpy(), bits, -1, symmetric)
        scale = torch.from_numpy(grid.scales[:, 0].copy())
        zero = torch.full((rows,), float(1 << (bits - 1))) if grid.zeros is None else torch.from_numpy(grid.zeros[:, 0]).float()
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty_like(part)
        for column, row in enumerate(part):
            code = (row / scale).round_().add_(zero).clamp_(0, top)
            codes[first + column] = code
            error = torch.sub(row, code.sub_(zero).mul_(scale), out=errors[column]).div_(block[column, column])
            part[column:].addr_(block[column, column:], error, alpha=-1)
        left[first + length :].addmm_(factor[first : first + length, first + length :].T, errors, alpha=-1)
    points = None if symmetric else torch.stack(zeros, 1).byte().numpy()
    permutation = None if order is None else order.int().numpy()
    return PackedLinear.from_codes(
        name, codes.T.contiguous().numpy(), torch.stack(scales, 1).numpy(), points, bits, group_size, permutation
    )


# --- all of them


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows.

    What is finished of it lies in ``job.scratch``, a folder a block: the same job goes on after the last finished block.
    """
    report_begun(Begun(len(job.linears), STATES))
    windows = job.windows()
    settings = _settings(job, [row.tolist() for row in windows])
    if _left_in(job.scratch) != settings:
        remove(job.scratch)
        job.scratch.mkdir(parents=True)
        write_json(job.scratch / JOB, settings)
    stream = Stream(job.checkpoint, windows)
    if (job.scratch / STATES).is_file():
        stream.resume(job.scratch / STATES)
        log.info("quantize: GPTQ goes on after block %d of %d, where it was interrupted", stream.done, len(stream))
    finished = {name: linear for index in range(stream.done) for name, linear in _block_of(job.scratch, index).items()}
    report_progress(len(finished), f"block {stream.done + 1} of {len(stream)}")
    while stream.done < len(stream):
        folder = _folder(job.scratch, stream.done)
        with stream.block() as block:
            found = {linear.name: linear for linear in _of_block(job, stream, block)}
            stream.advance()
        remove(folder)
        folder.mkdir()
        packed.save(found, folder)
        stream.keep(job.scratch / STATES)
        finished |= found
        report_progress(0, f"block {stream.done + 1} of {len(stream)}")
    return finished


def _settings(job: QuantizeJob, windows: list[list[int]]) -> JsonObject:
    """All that decides what GPTQ finds: a run with the same goes on where the last one ended."""
    options = job.options
    return {
        "model": str(job.checkpoint.path.resolve()),
        "weights": {file.name: sha256(file) for file in job.checkpoint.index.files},
        "forms": {name: list(job.format(name)) for name in job.linears},
        "symmetric": options.symmetric,
        "act_order": options.act_order,
        "damping": DAMPING,
        "windows": windows,
    }


def _left_in(scratch: Path) -> JsonObject | None:
    """The job that an interrupted run left in its scratch folder, if it can still be read."""
    try:
        return read_json(scratch / JOB)
    except (InputError, OSError, RecursionError):
        return None


def _folder(scratch: Path, index: int) -> Path:
    return scratch / f"block-{index:03d}"


def _block_of(scratch: Path, index: int) -> dict[str, PackedLinear]:
    return dict(PackedFile(_folder(scratch, index)))


def _of_block(job: QuantizeJob, stream: Stream, block: torch.nn.Module) -> Iterator[PackedLinear]:
    """The matrices of the block that is in memory, each of which becomes what its codes stand for before the next is looked at."""
    prefix = f"{stream.name}.{stream.done}"
    modules = {f"{prefix}.{name}": module for name, module in block.named_modules() if f"{prefix}.{name}" in job.linears}
    rest = set(modules)
    for step in _steps(stream, modules):
        hessians = _hessians(stream, {name: modules[name] for name in step})
        while hessians:
            for linear in _solved(job, modules, *hessians.pop(0)):
                rest.remove(linear.name)
                yield _placed(modules[linear.name], linear)
    if rest:
        log.info("quantize: no token of the calibration text reaches %s and %d more: rounded to nearest", min(rest), len(rest) - 1)
    for name in sorted(rest):
        yield round_to_nearest(name, matrix_of(modules[name]), *job.format(name), job.options.symmetric)


def _steps(stream: Stream, modules: Mapping[str, Linear]) -> list[list[str]]:
    """Names of the matrices in the order in which they run; a step is those that read one input, or the same part of all experts.

    Those that no token reaches are in no step.
    """
    steps: dict[str, list[str]] = {}
    with _inputs_of(modules) as seen:
        for _ in stream.run():
            for _, names in seen:
                step = steps.setdefault(_kind(names[0], stream), [])
                step += [name for name in names if name not in step]
            seen.clear()
            if sum(map(len, steps.values())) == len(modules):
                break
    return list(steps.values())


def _kind(name: str, stream: Stream) -> str:
    """``.mlp.experts.up_proj`` of ``model.layers.3.mlp.experts.5.up_proj``."""
    return re.sub(r"\.\d+", "", name.removeprefix(f"{stream.name}.{stream.done}"))


def _hessians(stream: Stream, modules: Mapping[str, Linear]) -> list[tuple[list[str], torch.Tensor]]:
    """The Hessians of a step's matrices, float32 (in, in), each with the names of those that share it.

    Section 3.1: twice the sum over tokens of the input's outer product; a common factor is of no account.
    """
    found: dict[str, tuple[list[str], torch.Tensor]] = {}
    kinds = {_kind(name, stream) for name in modules}
    last = list(modules.values())[-1] if len(kinds) == len(modules) else None  # which expert runs last is not known
    with _inputs_of(modules) as seen:
        for real in stream.run(last):
            for tensor, names in seen:
                rows = tensor.reshape(-1, tensor.shape[-1]).float()
                if len(rows) == real.numel():  # else an expert's, which gets some of them
                    rows = rows[real.flatten()]
                _, hessian = found.setdefault(names[0], (names, torch.zeros(rows.shape[1], rows.shape[1])))
                hessian.addmm_(rows.T, rows)
            seen.clear()
    return list(found.values())


@contextmanager
def _inputs_of(modules: Mapping[str, Linear]) -> Iterator[list[tuple[torch.Tensor, list[str]]]]:
    """A list that gets what enters the modules as they run: each input once, with the names of those that read it."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def look(name: str, args: BlockArgs) -> None:
        for tensor, names in seen:
            if tensor is args[0]:
                names.append(name)
                return
        seen.append((args[0], [name]))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(lambda _, args, name=name: look(name, args)).remove)
        yield seen


def _solved(job: QuantizeJob, modules: Mapping[str, Linear], names: list[str], hessian: torch.Tensor) -> Iterator[PackedLinear]:
    """Matrices that share a Hessian, which is spent."""
    order = None
    if job.options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
    dead = hessian.diagonal() == 0  # what is always 0: its columns are of no account, and the Hessian would have no inverse
    hessian.diagonal()[dead] = 1
    factor = inverse_factor(hessian)
    for name in names:
        weight = matrix_of(modules[name])
        if bool(dead.any()):
            weight = weight.clone()
            weight[:, dead if order is None else order[dead]] = 0
        yield quantized(name, weight, factor, *job.format(name), job.options.symmetric, order)


def _placed(module: Linear, linear: PackedLinear) -> PackedLinear:
    """Give the module the weights that its codes stand for."""
    weight = torch.from_numpy(linear.dequantized())
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    report_progress(1)
    return linear
