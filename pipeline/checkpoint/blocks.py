"""The decoder blocks of a torch model, run with some of them skipped or started again from a recorded state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import torch
from edgepress.pipeline.checkpoint.forwards import by_onednn, replaced
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.machine import rows_at_once
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# What a block is called with by position, and what it returns: the hidden states come first.
BlockArgs = tuple[torch.Tensor, ...]
BlockOutput = torch.Tensor | tuple[torch.Tensor | None, ...]


def decoder_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of the decoder blocks: the one ModuleList as long as the config's layer count. Raises ModelError."""
    count = model.config.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    # Experts or heads may be as many as layers: the outermost list is the blocks'.
    lists = [pair for pair in lists if not any(pair[0].startswith(other + ".") for other, _ in lists)]
    if len(lists) != 1:
        raise ModelError(
            f"cannot tell the decoder blocks of {type(model).__name__}: no single ModuleList has num_hidden_layers ({count}) "
            "entries; give a model of another architecture"
        )
    return lists[0]


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear | Conv1D]:
    """The linear layers inside the decoder blocks, by full name; GPT-2's Conv1D holds its weight as (in, out)."""
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{n}": m for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}


def block_matrices(model: PreTrainedModel) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Name -> (out, in) of the linear layers inside the blocks, and the names of those that are stored as (in, out)."""
    linears = block_linears(model)
    transposed = frozenset(name for name, module in linears.items() if isinstance(module, Conv1D))
    shapes = {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in linears.items()}
    return {name: (b, a) if name in transposed else (a, b) for name, (a, b) in shapes.items()}, transposed


def possible_names(model: PreTrainedModel, removed: int = 0) -> list[str]:
    """Every name that a linear layer may have once ``removed`` blocks are gone and the others are numbered anew.

    Blocks may differ in what they hold, and which ones stay is not known.
    """
    prefix, blocks = decoder_blocks(model)
    kinds = dict.fromkeys(name.removeprefix(f"{prefix}.").partition(".")[2] for name in block_linears(model))
    return [f"{prefix}.{index}.{kind}" for index in range(len(blocks) - removed) for kind in kinds]


class Enough(Exception):
    """What was asked for of a model is known; the rest of it need not run."""


class Blocks:
    """The residual stream of a model: what enters and leaves each decoder block.

    Blocks are replaced, not hooked, so that a skipped block costs no time. gradients: what is made can be differentiated. Raises
    ModelError when the architecture's blocks cannot be found.
    """

    def __init__(self, model: PreTrainedModel, gradients: bool = False) -> None:
        self.model, self._gradients = model, gradients
        self.name, self.modules = decoder_blocks(model)
        self._extras = self._extra_outputs()

    def __len__(self) -> int:
        return len(self.modules)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) of token ids (batch, tokens), without a cache."""
        with torch.inference_mode(not self._gradients), by_onednn(self.model.modules()):
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def heads(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of states (tokens, hidden) that leave the last block, some at a time: which, and (positions, vocabulary).

        But for the rounding of matrix products of another height they are those of ``logits``. Who keeps none when asking for the
        next has no more than one in memory.
        """
        config = self.model.config.get_text_config()
        rows = rows_at_once(config.vocab_size)
        rows = min(rows, getattr(config, "max_position_embeddings", rows))  # a learned position has to be there for each
        for first in range(0, len(hidden), rows):
            positions = slice(first, min(first + rows, len(hidden)))
            yield positions, self._head(hidden[positions])

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        # what the ids are is of no account: their embeddings go nowhere
        with self.entering(len(self), hidden[None]):
            return self.logits(torch.zeros((1, len(hidden)), dtype=torch.long)).squeeze(0)

    def drop(self) -> None:
        """Free the weights of the blocks: from now on nothing but ``heads`` works."""
        for parameter in self.modules.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    @contextmanager
    def without(self, removed: Sequence[int]) -> Iterator[None]:
        """Within the context the blocks ``removed`` hand their input on unchanged, unless they are replaced already."""
        with self._replaced({index: None for index in removed if "forward" not in self.modules[index].__dict__}):
            yield

    @contextmanager
    def entering(self, index: int, hidden: torch.Tensor) -> Iterator[None]:
        """Within the context the model computes nothing before block ``index``, which is given ``hidden`` (batch, tokens, hidden).

        index may be the number of blocks: then only what follows the blocks is computed.
        """
        with self._replaced({i: hidden if i == index - 1 else None for i in range(index)}):
            yield

    def states(self, ids: torch.Tensor, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """What enters the blocks ``indices``, (batch, tokens, hidden) each; the number of blocks stands for what leaves the last.

        Nothing is computed after the last of them.
        """
        states: dict[int, torch.Tensor] = {}
        end = max(indices)

        def entering(index: int) -> Callable[[torch.nn.Module, BlockArgs, dict[str, object]], None]:
            def hook(module: torch.nn.Module, args: BlockArgs, kwargs: dict[str, object]) -> None:
                states[index] = block_input(args, kwargs)
                if index == end:
                    raise Enough

            return hook

        def leaving(module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
            states[len(self)] = block_output(output)
            raise Enough

        handles = [self.modules[i].register_forward_pre_hook(entering(i), with_kwargs=True) for i in indices if i < len(self)]
        if end == len(self):
            handles.append(self.modules[-1].register_forward_hook(leaving))
        try:
            with suppress(Enough):
                self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return states

    @contextmanager
    def _replaced(self, given: Mapping[int, torch.Tensor | None]) -> Iterator[None]:
        """Within the context each of these blocks returns the hidden states given for it, or its input where that is None."""

        def hand_on(index: int) -> Callable[..., BlockOutput]:
            def forward(*args: torch.Tensor, **kwargs: object) -> BlockOutput:
                hidden = given[index]
                return as_output(block_input(args, kwargs) if hidden is None else hidden, self._extras[index])

            return forward

        with replaced({self.modules[index]: hand_on(index) for index in given}):
            yield

    def _extra_outputs(self) -> list[int | None]:
        """``extra_outputs`` of each block."""
        extras: list[int | None] = []

        def look(module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
            extras.append(extra_outputs(output))

        handles = [block.register_forward_hook(look) for block in self.modules]
        try:
            self.logits(torch.zeros((1, 2), dtype=torch.long))
        finally:
            for handle in handles:
                handle.remove()
        return extras


def block_input(args: BlockArgs, kwargs: Mapping[str, object]) -> torch.Tensor:
    """The hidden states given to a block, (batch, tokens, hidden)."""
    return args[0] if args else cast(torch.Tensor, kwargs["hidden_states"])


def block_output(output: BlockOutput) -> torch.Tensor:
    """The hidden states that a block returns, (batch, tokens, hidden)."""
    return cast(torch.Tensor, output[0]) if isinstance(output, tuple) else output


def extra_outputs(output: BlockOutput) -> int | None:
    """How many values a block returns besides the hidden states, None where it returns these bare."""
    return len(output) - 1 if isinstance(output, tuple) else None


def as_output(hidden: torch.Tensor, extras: int | None) -> BlockOutput:
    """Hidden states as a block with so many ``extra_outputs`` returns them."""
    return hidden if extras is None else (hidden, *[None] * extras)
