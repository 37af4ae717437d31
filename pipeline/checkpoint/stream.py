"""Texts taken through the decoder blocks of a checkpoint one after another, so that one block's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, block_input, block_output, decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.offloaded import in_memory
from edgepress.pipeline.errors import ModelError, OutputError
from edgepress.pipeline.text.windows import padded
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

TOKENS = 1024  # of a batch: what a block makes of so many is small beside its weights
_BLOCKS = "blocks"  # in the metadata of kept states: how many blocks they went through


@dataclass
class _Batch:
    """Windows on their way. real: which positions are tokens, (batch, tokens). hidden: what enters the next block.

    calls: what each block is called with besides: masks, positions.
    """

    real: torch.Tensor
    hidden: torch.Tensor
    calls: list[tuple[BlockArgs, dict[str, object]]]


class _Enough(Exception):
    """What was asked for is known."""


class Stream:
    """The residual stream of windows of token ids, (batch, tokens, hidden) a batch, between two blocks of a model.

    done: the number of blocks that it went through. A block may be changed while it is in memory, and be run any number of times
    before the stream ``advance``s. Raises ModelError where the decoder blocks cannot be told.
    """

    def __init__(self, checkpoint: Checkpoint, windows: list[np.ndarray]) -> None:
        self._weights = checkpoint.weights
        self.model, self._offloaded = _opened(checkpoint)
        self.name, self._blocks = decoder_blocks(self.model)
        self.done = 0
        self._bfloat16 = torch.cpu._is_avx512_bf16_supported()
        rows = max(1, TOKENS // len(windows[0]))
        self._bare = self._returns_tensor()
        self._batches = [self._begun(ids, real) for ids, real in padded(windows, rows)]

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    @contextmanager
    def block(self) -> Iterator[torch.nn.Module]:
        """The next block, its weights in memory, float32, within the context; its matrices are called ``name.done. ...``."""
        if not self._offloaded:
            yield self._blocks[self.done]
            return
        with in_memory(self.model, self._weights, f"{self.name}.{self.done}"):
            yield self._blocks[self.done]

    def run(self, last: torch.nn.Module | None = None) -> Iterator[torch.Tensor]:
        """Run the next block, which is in memory, on every batch; yields which positions are tokens, bool (batch, tokens).

        last: a module of the block that need not run, nor what follows it: what enters it is all that is wanted. To see what goes
        on in the block, hook its modules.
        """

        def stop(module: torch.nn.Module, args: BlockArgs) -> None:
            raise _Enough

        handle = None if last is None else last.register_forward_pre_hook(stop)  # after hooks that were there before
        try:
            for batch in self._batches:
                with suppress(_Enough), torch.inference_mode():
                    self._run(batch)
                yield batch.real
        finally:
            if handle is not None:
                handle.remove()

    def advance(self) -> None:
        """Take the stream through the next block, which is in memory, as it is now."""
        with torch.inference_mode():
            for batch in self._batches:
                batch.hidden = self._run(batch)
        self.done += 1

    def states(self) -> Iterator[torch.Tensor]:
        """What enters the next block, or leaves the last: (tokens, hidden) a batch, padding left out."""
        for batch in self._batches:
            yield batch.hidden[batch.real]

    def read_by(self, module: torch.nn.Module) -> Iterator[torch.Tensor]:
        """What enters a module that follows the blocks, (tokens, in) a batch, padding left out: once all blocks are done."""
        found: list[torch.Tensor] = []

        def look(module: torch.nn.Module, args: BlockArgs) -> None:
            found.append(args[0])
            raise _Enough

        handle = module.register_forward_pre_hook(look)
        try:
            for batch in self._batches:
                found.clear()
                with self._replaced(lambda *args, **kwargs: self._as_output(batch.hidden)):  # noqa: B023 (called at once)
                    self._call(torch.zeros(batch.real.shape, dtype=torch.long))
                yield found[0][batch.real]
        finally:
            handle.remove()

    def keep(self, file: Path) -> None:
        """Write the states and how many blocks they went through; an earlier file is replaced whole. Raises OutputError."""
        part = file.with_suffix(".part")
        states = {str(index): batch.hidden.contiguous() for index, batch in enumerate(self._batches)}
        try:
            save_file(states, part, {_BLOCKS: str(self.done)})
        except SafetensorError as error:
            raise OutputError(f"cannot write {part} ({error}); free some disk space or choose another output folder") from error
        part.replace(file)

    def resume(self, file: Path) -> None:
        """Go on from states that ``keep`` wrote of the same windows in the same model. Raises ModelError for a damaged file."""
        try:
            with safe_open(file, framework="pt") as kept:
                states = [kept.get_tensor(str(index)) for index in range(len(self._batches))]
                done = int(kept.metadata()[_BLOCKS])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is damaged ({error}); remove it") from error
        self.done = done
        for batch, hidden in zip(self._batches, states, strict=True):
            batch.hidden = hidden

    def _run(self, batch: _Batch) -> torch.Tensor:
        args, kwargs = batch.calls[self.done]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bfloat16):
            return block_output(self._blocks[self.done](batch.hidden, *args, **kwargs)).float()

    def _returns_tensor(self) -> bool:
        """Whether blocks return their states bare, not in a tuple: shown by the first."""
        found: list[bool] = []

        def look(module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
            found.append(isinstance(output, torch.Tensor))
            raise _Enough

        handle = self._blocks[0].register_forward_hook(look)
        try:
            self._call(torch.zeros((1, 2), dtype=torch.long))
        finally:
            handle.remove()
        return found[0]

    def _begun(self, ids: np.ndarray, real: np.ndarray) -> _Batch:
        """A batch before the first block, and what each block will be called with: no block runs for that."""
        calls: list[tuple[BlockArgs, dict[str, object]]] = []
        entered: list[torch.Tensor] = []

        def forward(*args: torch.Tensor, **kwargs: object) -> BlockOutput:
            hidden = block_input(args, kwargs)
            entered.append(hidden)
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
            if len(calls) == len(self._blocks):
                raise _Enough
            return self._as_output(hidden)

        with self._replaced(forward):
            self._call(torch.from_numpy(ids))
        return _Batch(torch.from_numpy(real), entered[0], calls)

    def _call(self, ids: torch.Tensor) -> None:
        """Run the model until something has seen enough."""
        with suppress(_Enough), torch.inference_mode():
            self.model(input_ids=ids, use_cache=False)

    def _as_output(self, hidden: torch.Tensor) -> BlockOutput:
        return hidden if self._bare else (hidden, None)

    @contextmanager
    def _replaced(self, forward: Callable[..., BlockOutput]) -> Iterator[None]:
        """Within the context this runs in place of every block."""
        former = [block.__dict__.get("forward") for block in self._blocks]
        for block in self._blocks:
            block.forward = forward
        try:
            yield
        finally:
            for block, own in zip(self._blocks, former, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


def _opened(checkpoint: Checkpoint) -> tuple[PreTrainedModel, bool]:
    """The model and whether its weights are read as they are needed; whole where its files have other names than its modules."""
    try:
        return checkpoint.offloaded_model(), True
    except ModelError:
        return checkpoint.model(), False
