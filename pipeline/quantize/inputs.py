"""What enters the matrices of a block: the Hessians of GPTQ, and what it lacks of what the original's matrices read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs
from edgepress.pipeline.checkpoint.forwards import replaced
from edgepress.pipeline.checkpoint.stream import Stream
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.quantize.rtn import matrix_of
from scipy.linalg.lapack import strtri
from transformers.pytorch_utils import Conv1D

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it (section 3.3, step 3)
# Of the norm of a matrix, how far it is moved at most: what moves it further follows chance.
MOVED = 0.25
# Of the median norm of what enters a matrix, how long a token's counts at most. The first of a text may enter a down projection
# with thirty times as much (Sun et al. 2024, Massive Activations), and the matrix would be fitted to it alone.
LONGEST = 3.0
JUDGING = 256  # tokens, at least, by which the move of a matrix is judged
_COLUMNS = 384  # of X'X at a time, of which only what lies below the diagonal is computed
Linear: TypeAlias = torch.nn.Linear | Conv1D
_PRODUCTS = (torch.nn.Linear.forward, Conv1D.forward)  # a router of some families is a Linear that gives more
# By module, the first of those that read it: what enters it in the original, (tokens, in) a batch.
Originals: TypeAlias = dict[str, list[torch.Tensor]]


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U of which U'U is the inverse of the Hessian (in, in), damped as far as it must be.

    Section 3.3, step 3. Not by way of the inverse: with H = MM' and M upper triangular, which is the Cholesky factor of H read from
    its end, U is the inverse of M. Raises ModelError for NaN and Inf.
    """
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise ModelError("the calibration text makes numbers that are not finite in the model; the checkpoint is broken")
    reversed_ = hessian.flip(0, 1)
    step = DAMPING * (reversed_.diagonal().mean() or 1.0)
    while True:
        reversed_.diagonal().add_(step)
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not failed:
            break
        step *= 2
    del reversed_
    # LAPACK counts in columns, so it sees a lower one. Of torch there is only the solution for a unit matrix: four times as long.
    inverse, failed = strtri(lower.flip(0, 1).contiguous().numpy().T, lower=1, overwrite_c=1)
    if failed:
        raise ModelError(
            "the calibration text makes numbers that are too small or too large to divide by; the checkpoint is broken"
        )
    return torch.from_numpy(inverse.T)


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X'X of the rows X (tokens, in) to the sum (in, in): what lies below the diagonal, half of the products.

    ``mirror`` brings the rest up to date.
    """
    for first in range(0, len(gram), _COLUMNS):
        end = min(first + _COLUMNS, len(gram))
        gram[first:end, :end].addmm_(rows[:, first:end].T, rows[:, :end])


def mirror(gram: torch.Tensor) -> None:
    """Copy what lies below the diagonal of a sum that ``add_gram`` made to its other half."""
    for first in range(0, len(gram), _COLUMNS):
        end = min(first + _COLUMNS, len(gram))
        gram[:first, first:end] = gram[first:end, :first].T


class Input:
    """What some matrices read: its Hessian, and what it lacks of the original's, gathered batch by batch.

    names: of the matrices. hessian: X'X of the inputs X (tokens, in), float32 (in, in); section 3.1 of Frantar et al. 2022 has it
    twice, a common factor is of no account. Where the original's inputs O are known, (O - X)'X is gathered as well, by which
    ``aim`` moves a matrix; how far, half of the tokens tell, of what the other half proposes. share: of the proposed step, what
    loses least on tokens that did not propose it.
    """

    def __init__(self, names: list[str], size: int, weights: list[torch.Tensor] | None) -> None:
        """weights: float32 (out, in), of the matrices, where the original's inputs are known."""
        self.names, self.hessian = names, torch.zeros(size, size)
        self._weights = weights or []
        self._outputs = [len(weight) for weight in self._weights]
        # W (O - X)'X is all that is needed: of a matrix with few outputs it takes less to gather that
        self._projected = 2 * sum(self._outputs) < size
        self._lacking = None if weights is None else torch.zeros(sum(self._outputs) if self._projected else size, size)
        self._steps: list[torch.Tensor] = []
        self._before, self.share = torch.zeros(2), 0.0

    def add(self, rows: torch.Tensor, original: torch.Tensor | None) -> None:
        """Inputs, float32 (tokens, in), and the original's, bfloat16."""
        weights = _weights(rows)
        scaled = rows * weights
        add_gram(self.hessian, scaled)
        if self._lacking is not None and original is not None:
            # the difference of what is rounded alike: nothing where nothing is lost
            lacking = (original.float() - rows.bfloat16().float()) * weights
            if self._projected:
                lacking = torch.cat([lacking @ weight.T for weight in self._weights], 1)
            self._lacking.addmm_(lacking.T, scaled)

    def half(self) -> None:
        """Half of the tokens are read: what they propose is judged by the others."""
        if self._lacking is not None and bool(self._lacking.any()):
            mirror(self.hessian)
            factor, order = inverse_factor(self.hessian), torch.arange(len(self.hessian))
            self._steps = [self._step(number, weight, factor, order) for number, weight in enumerate(self._weights)]
            self._before = self._products()

    def finish(self) -> None:
        """All tokens are read."""
        mirror(self.hessian)
        won, made = (self._products() - self._before).tolist()
        self.share = min(1.0, max(0.0, won / made)) if made > 0 else 0.0
        self._steps, self._weights = [], []

    def _products(self) -> torch.Tensor:
        """Summed over the tokens so far: what the steps S make, times what the outputs lack, and squared; (2,)."""
        sums = torch.zeros(2)
        for number, step in enumerate(self._steps):  # none where nothing is lost
            lacking = self._of_outputs(number, self._weights[number])
            sums += torch.stack([(lacking * step).sum(), (step @ self.hessian).mul_(step).sum()])
        return sums

    def aim(self, name: str, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """What the matrix (out, in) should be to make of its input what it makes of the original's, as far as that carries over.

        Arai and Ichikawa 2025 (Quantization Error Propagation), section 4: W + share W (O - X)'X H^-1. factor, order: of
        ``inverse_factor``.
        """
        if not self.share:
            return weight
        move = self._step(self.names.index(name), weight, factor, order).mul_(self.share)
        if (norm := float(move.norm())) > (most := MOVED * float(weight.norm())):
            move.mul_(most / norm)
        return move.add_(weight)

    def _step(self, number: int, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        step = torch.empty_like(weight)
        step[:, order] = self._of_outputs(number, weight)[:, order] @ factor.T @ factor
        return step

    def _of_outputs(self, number: int, weight: torch.Tensor) -> torch.Tensor:
        """What the outputs of one of the matrices lack, times the inputs: W (O - X)'X, (out, in)."""
        assert self._lacking is not None
        first = sum(self._outputs[:number])
        return self._lacking[first : first + self._outputs[number]] if self._projected else weight @ self._lacking


def _weights(rows: torch.Tensor) -> torch.Tensor:
    """What each token (tokens, in) is multiplied by, (tokens, 1): 1 but for the longest."""
    norms = rows.norm(dim=1, keepdim=True)
    most = LONGEST * norms.median()
    return torch.where(norms > most, most / norms, 1.0) if most > 0 else torch.ones_like(norms)


def originals(stream: Stream, modules: Mapping[str, Linear]) -> Originals:
    """What enters each module of a block as it is in the original; called before any of them is changed.

    Not experts: the original gives them other tokens. Nothing where blocks hand on more than the stream, for what the original's
    would is overwritten by what the quantized ones do; nor where the text is too short to judge by half of it.
    """
    found: Originals = {}
    if not stream.resumable or _half(stream) is None:
        return found
    kinds = Counter(_kind(name, stream) for name in modules)
    alone = {name: module for name, module in modules.items() if kinds[_kind(name, stream)] == 1}
    with _inputs_of(alone) as seen:
        for _ in stream.advance_original():
            for tensor, names in seen:
                found.setdefault(names[0], []).append(tensor.flatten(0, -2).bfloat16())  # half of the memory
            seen.clear()
    return found


def _half(stream: Stream) -> int | None:
    """The batch with which the second half of the tokens begins; None where that has too few to judge by."""
    ends = list(accumulate(stream.sizes))
    batch = next(index for index, end in enumerate(ends) if 2 * end >= ends[-1])
    return batch + 1 if ends[-1] - ends[batch] >= JUDGING else None


class Step(NamedTuple):
    """Names of matrices that read one input, or that are the same part of all experts.

    single: whether they read one tensor, once a batch, and give its product with their weights and nothing else. So none reads what
    another makes; of experts and other numbered parts that is not known.
    """

    names: list[str]
    single: bool


def steps(stream: Stream, modules: Mapping[str, Linear]) -> list[Step]:
    """In the order in which they run. Matrices that no token reaches are in no step."""
    found: dict[str, list[str]] = {}
    single: dict[str, bool] = {}
    with _inputs_of(modules) as seen:
        for _ in stream.run():
            here = Counter(_kind(names[0], stream) for _, names in seen)
            for _, names in seen:
                kind, kinds = _kind(names[0], stream), {_kind(name, stream) for name in names}
                plain = all(type(modules[name]).forward in _PRODUCTS for name in names)
                single[kind] = single.get(kind, True) and here[kind] == 1 and len(kinds) == len(names) and plain
                step = found.setdefault(kind, [])
                step += [name for name in names if name not in step]
            seen.clear()
            if sum(map(len, found.values())) == len(modules):
                break
    return [Step(names, single[kind]) for kind, names in found.items()]


def read(stream: Stream, modules: Mapping[str, Linear], originals: Originals, single: bool) -> list[Input]:
    """What the matrices of a step read; what the original's did is taken out of ``originals``. single: of the step."""
    found: dict[str, Input] = {}
    kinds, half = {_kind(name, stream) for name in modules}, _half(stream)
    last = list(modules.values())[-1] if len(kinds) == len(modules) else None  # which expert runs last is not known
    unmade = {module: partial(_nothing, matrix_of(module).shape[0]) for module in modules.values() if single}
    with _inputs_of(modules) as seen, replaced(unmade):
        for batch, _ in enumerate(stream.run(last)):
            if batch == half:
                for one in found.values():
                    one.half()
            for tensor, names in seen:
                rows = tensor.reshape(-1, tensor.shape[-1]).float()
                others = originals.get(names[0], [])
                paired = len(others) == len(stream.sizes) and others[batch].shape == rows.shape  # it runs once a batch
                if names[0] not in found:
                    weights = [matrix_of(modules[name]) for name in names] if paired else None
                    found[names[0]] = Input(names, rows.shape[1], weights)
                found[names[0]].add(rows, others[batch] if paired else None)
            seen.clear()
    for name, one in found.items():
        originals.pop(name, None)
        one.finish()
    return list(found.values())


def _nothing(width: int, input: torch.Tensor) -> torch.Tensor:
    """In the place of a product that nobody reads before the step is over, in its type."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    return torch.zeros(*input.shape[:-1], width, dtype=dtype)


@contextmanager
def _inputs_of(modules: Mapping[str, Linear]) -> Iterator[list[tuple[torch.Tensor, list[str]]]]:
    """A list that gets what enters the modules as they run: each input once, with the names of those that read it."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def look(name: str, args: BlockArgs, kwargs: dict[str, torch.Tensor]) -> None:
        (entering,) = (*args, *kwargs.values())
        for tensor, names in seen:
            if tensor is entering:
                names.append(name)
                return
        seen.append((entering, [name]))

    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = partial(lambda name, _, args, kwargs: look(name, args, kwargs), name)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


def _kind(name: str, stream: Stream) -> str:
    """``.mlp.experts.up_proj`` of ``model.layers.3.mlp.experts.5.up_proj``."""
    return re.sub(r"\.\d+", "", name.removeprefix(f"{stream.name}.{stream.done}"))
