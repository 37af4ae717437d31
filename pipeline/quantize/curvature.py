"""What rounding each matrix costs, all from one pass: the second-order estimate of the KL divergence.

A small change of the weights moves the output distribution by KL = 1/2 d'Fd, F the Fisher information. For one matrix and one
window of text, d'Fd is the expected square of how the log-likelihood of tokens drawn from the model itself changes along d
(Amari 1998, section 2; as in Hassibi and Stork 1993 with F for the Hessian). So a factor on each matrix's rounding error, its
gradient over windows of drawn tokens, and a square: no matrix is evaluated alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, Blocks, block_linears, decoder_blocks
from edgepress.pipeline.checkpoint.weight_file import WeightFile, let_go, weight_file
from edgepress.pipeline.machine import prefers_bfloat16, release_memory
from edgepress.pipeline.metrics.torch_scores import in_cache
from edgepress.pipeline.own_text.sampler import by_chance
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.rtn import matrix_of, round_to_nearest
from transformers import PreTrainedModel

BATCH = 4  # windows, fewer where what the backward pass needs of them takes more memory than ``_KEPT``
DRAWS = 2  # of tokens for each window: a backward pass is cheaper than a window more
# Bytes; and those of a token for each number that leaves a matrix: that, what the error adds, and what follows from both.
_KEPT, _KEPT_OF_ONE = 2**29, 12


class Errors:
    """Rounding errors of the block matrices at one format, bfloat16, and a factor on each, one a window of the batch.

    together: names of matrices that read one input (query, key and value; gate and up), known after the first pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bits: int,
        group_size: int,
        without: Collection[str] = (),
        symmetric: bool = False,
        spent: bool = False,
    ) -> None:
        """without: names of matrices that are left alone.

        spent: nobody needs the model any more, whose matrices get the type that ``costs`` computes in. Otherwise a copy of each in
        that type is kept for the backward pass, three times the memory in all.
        """
        self.symmetric = symmetric
        self.modules = {name: module for name, module in block_linears(model).items() if name not in without}
        self.factors: dict[str, torch.Tensor] = {}
        self.together: list[list[str]] = []
        self._inputs: dict[str, torch.Tensor] = {}
        self._errors = {}
        # of weights that do not fit into memory the errors do not either
        self._file = weight_file(model) and WeightFile(sum(2 * module.weight.numel() for module in self.modules.values()))
        self.bfloat16 = prefers_bfloat16() and self._file is None
        halved = {id(p) for p in model.parameters() if p.ndim == 2} if spent and self.bfloat16 else set()
        for name, module in progress(self.modules.items(), "rounding", "matrix"):
            weight = matrix_of(module)
            restored = round_to_nearest(name, weight.numpy(), bits, group_size, symmetric).dequantized()
            error = (torch.from_numpy(restored) - weight).bfloat16()
            self._errors[name] = error if self._file is None else self._file.put(error, error.dtype)
            let_go(module.weight)
            if id(module.weight) in halved:
                module.weight.data = module.weight.data.bfloat16()
        for parameter in model.parameters():
            if id(parameter) in halved:
                parameter.data = parameter.data.bfloat16()
        release_memory()

    @contextmanager
    def added(self, windows: int) -> Iterator[None]:
        """Within the context every matrix adds its factor, zero, times what its error would add to the output."""
        self.factors = {name: torch.zeros(windows, requires_grad=True) for name in self.modules}
        handles = [module.register_forward_hook(self._adding(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        inputs: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self._inputs.items():
            inputs[id(tensor)].append(name)
        self.together = list(inputs.values())
        self._inputs.clear()

    def _adding(self, name: str) -> Callable[[torch.nn.Module, BlockArgs, torch.Tensor], torch.Tensor]:
        def add(module: torch.nn.Module, args: BlockArgs, output: torch.Tensor) -> torch.Tensor:
            self._inputs[name] = args[0]  # kept, so that no other tensor gets its place
            dtype = torch.bfloat16 if self.bfloat16 else torch.float32  # to widen an error takes a fiftieth of its product
            moved = torch.nn.functional.linear(args[0].detach().to(dtype), self._errors[name].to(dtype)).to(output.dtype)
            if self._file is not None:
                self._file.release([self._errors[name]])
            factor = self.factors[name]
            factor = factor.repeat_interleave(len(output) // len(factor))  # some blocks join windows and tokens
            return output + factor.view(-1, *[1] * (output.ndim - 1)) * moved

        return add


def costs(model: PreTrainedModel, errors: Errors, windows: list[np.ndarray], seed: int = 0) -> dict[str, float]:
    """KL(model || model with this matrix alone rounded), nats a token, for every block matrix.

    windows: token ids, all of one length. The estimate's standard error is at least sqrt(2 / windows / DRAWS) of it.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    in_its_type = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=errors.bfloat16)
    with in_its_type():
        blocks = Blocks(model, gradients=True)
    squares = dict.fromkeys(errors.modules, 0.0)
    size = max(1, min(BATCH, _KEPT // (_kept_of_a_token(model) * len(windows[0]))))
    for first in progress(range(0, len(windows), size), "sensitivity", "batch"):
        ids = torch.from_numpy(np.stack(windows[first : first + size]))
        with errors.added(len(ids)):
            with in_its_type():
                leaving = blocks.states(ids, [len(blocks)])[len(blocks)]
                draws = _draws(blocks, leaving, generator)
            factors = list(errors.factors.values())
            for rest, toward in zip(reversed(range(DRAWS)), draws, strict=True):
                found = torch.autograd.grad(leaving, factors, toward, retain_graph=rest > 0, allow_unused=True)
                for name, gradient in zip(errors.factors, found, strict=True):
                    squares[name] += 0.0 if gradient is None else float(gradient.double().square().sum()) / DRAWS
    return {name: square / (2 * sum(map(len, windows))) for name, square in squares.items()}


def _kept_of_a_token(model: PreTrainedModel) -> int:
    """Bytes that a backward pass through the blocks needs of a token; of experts in one tensor it may go through all of them."""
    matrices = [len(matrix_of(module)) for module in block_linears(model).values()]
    experts = [weight.shape[0] * weight.shape[1] for weight in decoder_blocks(model)[1].parameters() if weight.ndim == 3]
    return _KEPT_OF_ONE * sum(matrices + experts)


def _draws(blocks: Blocks, leaving: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Gradients of the negative log-likelihood of tokens drawn from the model, by what leaves its last block, for each draw.

    leaving: (windows, tokens, hidden), as the gradients are. What follows the blocks is differentiated apart from them, by rows: so
    all logits are never there at once, and yet its products are of several windows.
    """
    states = leaving.detach().flatten(0, 1).requires_grad_()
    found = [torch.zeros_like(states) for _ in range(DRAWS)]
    for _, logits in blocks.heads(states):
        with torch.no_grad():
            chances = torch.softmax(logits.float(), -1)
            drawn = _drawn(chances, generator).split(1, -1)
        for rest, tokens, gradients in zip(reversed(range(DRAWS)), drawn, found, strict=True):
            ones = torch.ones_like(tokens, dtype=chances.dtype)
            toward = chances.scatter_add_(-1, tokens, -ones).to(logits.dtype)  # of the loss, before anything is rounded
            gradients += torch.autograd.grad(logits, states, toward, retain_graph=rest > 0)[0]
            chances.scatter_add_(-1, tokens, ones)
        del logits, chances, toward
    return [gradients.view_as(leaving) for gradients in found]


def _drawn(chances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``DRAWS`` tokens for each position (positions, vocabulary), (positions, draws).

    By their sums: ``torch.multinomial`` makes a random number for every token of the vocabulary, on one thread.
    """
    parts = []
    for few in in_cache(chances):
        parts.append(by_chance(few.cumsum(-1), torch.rand(len(few), DRAWS, generator=generator)))
    return torch.cat(parts)
