"""Texts taken through the decoder blocks of a checkpoint one after another, so that one block's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import (
    BlockArgs,
    BlockOutput,
    Enough,
    as_output,
    block_input,
    block_output,
    decoder_blocks,
    extra_outputs,
)
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.forwards import by_onednn, replaced
from edgepress.pipeline.checkpoint.offloaded import in_memory
from edgepress.pipeline.errors import ModelError, OutputError
from edgepress.pipeline.machine import prefers_bfloat16
from edgepress.pipeline.text.windows import padded
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

TOKENS = 1024  # of a batch: what a block makes of so many is small beside its weights
_ORIGINAL = ".original"  # behind the number of a batch, in the file of kept states
_BLOCKS = "blocks"  # in the metadata of kept states: how many blocks they went through


@dataclass
class _Batch:
    """Windows of one length on their way. ids: (batch, tokens). hidden: what enters the next block, (batch, tokens, hidden).
    original: the same, had no block been changed; None where nobody takes it along.

    calls: what each block is called with besides: masks, positions.
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    calls: list[tuple[BlockArgs, dict[str, object]]]
    original: torch.Tensor | None = None


class Stream:
    """The residual stream of windows of token ids, (batch, tokens, hidden) a batch, between two blocks of a model.

    done: the number of blocks that it went through. A block may be changed while it is in memory, and be run any number of times
    before the stream ``advance``s. runs: of a block on a batch so far. batch: number of the one that it ran on last. On a processor
    that is faster in bfloat16 blocks compute in it, and add to a stream of float32.
    Raises ModelError where the decoder blocks cannot be told, or where something happens to the stream between them.
    """

    def __init__(self, checkpoint: Checkpoint, windows: list[np.ndarray]) -> None:
        self._weights = checkpoint.weights
        self.model, self._offloaded = _opened(checkpoint)
        self.name, self._blocks = decoder_blocks(self.model)
        self.done = self.runs = self.batch = 0
        rows = max(1, TOKENS // len(windows[0]))
        # by length, so that no padding is read, which experts would count
        batches = [ids for _, alike in groupby(windows, key=len) for ids, _ in padded(list(alike), rows)]
        with self._embedding():
            self._extras = self._extra_outputs()
            self._batches = [self._begun(torch.from_numpy(ids)) for ids in batches]

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each batch."""
        return [batch.ids.numel() for batch in self._batches]

    @property
    def resumable(self) -> bool:
        """Whether the states are all that a block gets from those before it: some hand on keys and values in a dictionary."""
        return not any(isinstance(value, MutableMapping) for _, kwargs in self._batches[0].calls for value in kwargs.values())

    @contextmanager
    def block(self) -> Iterator[torch.nn.Module]:
        """The next block, its weights in memory, float32, within the context; its matrices are called ``name.done. ...``."""
        with self._in_memory(f"{self.name}.{self.done}"):
            yield self._blocks[self.done]

    def run(self, last: torch.nn.Module | None = None) -> Iterator[None]:
        """Run the next block, which is in memory, on one batch after the other; yields after each.

        last: a module of the block that need not run, nor what follows it: what enters it is all that is wanted. To see what goes
        on in the block, hook its modules.
        """

        def stop(module: torch.nn.Module, args: BlockArgs) -> None:
            raise Enough

        handle = None if last is None else last.register_forward_pre_hook(stop)  # after hooks that were there before
        try:
            for number, batch in enumerate(self._batches):
                with suppress(Enough), torch.inference_mode():
                    self._run(number, batch.hidden)
                yield
        finally:
            if handle is not None:
                handle.remove()

    def advance(self) -> None:
        """Take the stream through the next block, which is in memory, as it is now."""
        with torch.inference_mode():
            for number, batch in enumerate(self._batches):
                batch.hidden = self._run(number, batch.hidden)
        self.done += 1

    def advance_original(self) -> Iterator[None]:
        """Take the stream as no changed block made it through the next block, before that is changed; yields after each batch."""
        for number, batch in enumerate(self._batches):
            with torch.inference_mode():
                batch.original = self._run(number, batch.hidden if batch.original is None else batch.original)
            yield

    def read_by(self, module: torch.nn.Module) -> Iterator[torch.Tensor]:
        """What enters a module that follows the blocks, (tokens, in) a batch: once all blocks are done."""
        found: list[torch.Tensor] = []

        def look(module: torch.nn.Module, args: BlockArgs) -> None:
            found.append(args[0])
            raise Enough

        handle = module.register_forward_pre_hook(look)
        try:
            with self._embedding():
                for batch in self._batches:
                    found.clear()
                    with self._replaced(lambda *args, **kwargs: as_output(batch.hidden, self._extras)):  # noqa: B023 (called at once)
                        self._call(batch.ids)
                    yield found[0].flatten(0, -2)
        finally:
            handle.remove()

    def keep(self, file: Path) -> None:
        """Write the states and how many blocks they went through; an earlier file is replaced whole. Raises OutputError."""
        part = file.with_suffix(".part")
        states = {str(index): batch.hidden.contiguous() for index, batch in enumerate(self._batches)}
        for index, batch in enumerate(self._batches):
            if batch.original is not None:
                states[f"{index}{_ORIGINAL}"] = batch.original.contiguous()
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
                names = [f"{index}{_ORIGINAL}" for index in range(len(self._batches))]
                originals = [kept.get_tensor(name) if name in kept.keys() else None for name in names]  # noqa: SIM118 (no dictionary)
                done = int(kept.metadata()[_BLOCKS])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file} is damaged ({error}); remove it") from error
        if [state.shape for state in states] != [batch.hidden.shape for batch in self._batches]:
            raise ModelError(f"{file} is of other windows; remove it")
        self.done = done
        for batch, hidden, original in zip(self._batches, states, originals, strict=True):
            batch.hidden, batch.original = hidden, original

    def _run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        self.runs, self.batch = self.runs + 1, number
        args, kwargs = self._batches[number].calls[self.done]
        block = self._blocks[self.done]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=prefers_bfloat16()), by_onednn(block.modules()):
            return block_output(block(hidden, *args, **kwargs))

    @contextmanager
    def _in_memory(self, name: str) -> Iterator[None]:
        """Within the context the weights of this module are in memory."""
        if not self._offloaded:
            yield
            return
        with in_memory(self.model, self._weights, name):
            yield

    def _embedding(self) -> AbstractContextManager[None]:
        """Within the context the embedding is in memory: it would be read for every batch."""
        embedding = self.model.get_input_embeddings()
        return self._in_memory(next(name for name, module in self.model.named_modules() if module is embedding))

    def _extra_outputs(self) -> int | None:
        """``extra_outputs`` of the blocks: shown by the first."""
        found: list[int | None] = []

        def look(module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
            found.append(extra_outputs(output))
            raise Enough

        handle = self._blocks[0].register_forward_hook(look)
        try:
            self._call(torch.zeros((1, 2), dtype=torch.long))
        finally:
            handle.remove()
        return found[0]

    def _begun(self, ids: torch.Tensor) -> _Batch:
        """A batch before the first block, and what each block will be called with: no block runs for that."""
        calls: list[tuple[BlockArgs, dict[str, object]]] = []
        entered: list[torch.Tensor] = []

        def forward(*args: torch.Tensor, **kwargs: object) -> BlockOutput:
            hidden = block_input(args, kwargs)
            entered.append(hidden)
            if hidden is not entered[0]:
                raise ModelError("what leaves a block of this model is changed before it enters the next; use --method rtn")
            calls.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))
            if len(calls) == len(self._blocks):
                raise Enough
            return as_output(hidden, self._extras)

        with self._replaced(forward):
            self._call(ids)
        return _Batch(ids, entered[0], calls)

    def _call(self, ids: torch.Tensor) -> None:
        """Run the model until something has seen enough."""
        with suppress(Enough), torch.inference_mode():
            self.model(input_ids=ids, use_cache=False)

    def _replaced(self, forward: Callable[..., BlockOutput]) -> AbstractContextManager[None]:
        """Within the context this runs in place of every block."""
        return replaced(dict.fromkeys(self._blocks, forward))


def _opened(checkpoint: Checkpoint) -> tuple[PreTrainedModel, bool]:
    """The model and whether its weights are read as they are needed; whole where its files have other names than its modules."""
    try:
        return checkpoint.offloaded_model(), True
    except ModelError:
        return checkpoint.model(), False
