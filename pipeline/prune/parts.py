"""Removal of the attention or of the feed-forward part of a block alone: measured, tried and healed as whole blocks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from edgepress.models.families import FAMILIES, PARTS
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, Blocks, block_input, block_output
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.least_squares import Target, last_matrix
from edgepress.pipeline.checkpoint.parts import part_name, within
from edgepress.pipeline.checkpoint.update import carry_files, replace_tensors
from edgepress.pipeline.files import write_json
from edgepress.pipeline.metrics.torch_scores import batches
from edgepress.pipeline.progress import progress
from edgepress.pipeline.prune.healed import Gap, HealedTrials
from edgepress.pipeline.prune.influence import Influence, check_finite, cosine, measure_influence
from transformers import PreTrainedModel


class Parts(Blocks):
    """The blocks of a model, of which ``without`` takes one part, while the other stays.

    part: a key of ``models.families.PARTS``. absent: indices of the blocks that lack it already.
    """

    def __init__(self, model: PreTrainedModel, part: str, absent: Sequence[int]) -> None:
        super().__init__(model)
        self.part, self.absent = part, absent
        where = PARTS[part]
        self.outputs = [block.get_submodule(f"{where.module}.{where.output}") for block in self.modules]

    @contextmanager
    def without(self, removed: Sequence[int]) -> Iterator[None]:
        """Within the context the parts of the blocks ``removed`` write zeros, as they will in the checkpoint."""
        with ExitStack() as stack:
            for index in removed:
                handle = self.outputs[index].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
                stack.callback(handle.remove)
            yield


def influence_of(blocks: Blocks, windows: list[np.ndarray], lengths: Sequence[int] = ()) -> Influence:
    """Influence of what ``blocks.without`` takes: see ``measure_influence``; of parts there are no runs."""
    if not isinstance(blocks, Parts):
        return measure_influence(blocks, windows, lengths)
    meter = _Meter(blocks)
    with meter.watching():
        for ids, real in progress(batches(blocks.model, windows), "influence of parts", "batch"):
            meter.begin(real)
            blocks.states(ids, [len(blocks)])
    return Influence(np.concatenate(meter.changes), {}, np.array([len(row) for row in windows]))


class _Meter:
    """How much one part of each block turns the residual stream, 1 - cos (He et al. 2024, section 3.1), summed over real tokens.

    changes: (batch, blocks) a batch.
    """

    def __init__(self, blocks: Parts) -> None:
        family = FAMILIES[blocks.model.config.model_type]
        self.first, self.blocks = blocks.part == "attention", list(blocks.modules)
        # What enters the norm before the feed-forward part, or that part itself, is the stream behind attention.
        self.middles = [block.get_submodule(family.before_mlp or PARTS["feed-forward"].module) for block in self.blocks]
        self.changes: list[np.ndarray] = []
        self._real, self._between = torch.empty(0), torch.empty(0)

    def begin(self, real: torch.Tensor) -> None:
        """A new batch; real: which positions are tokens, not padding, bool (batch, tokens)."""
        self._real = real
        self.changes.append(np.zeros((len(real), len(self.blocks))))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context every forward is measured."""
        with ExitStack() as stack:
            for index, (block, middle) in enumerate(zip(self.blocks, self.middles, strict=True)):
                stack.callback(middle.register_forward_pre_hook(self._see).remove)
                stack.callback(block.register_forward_hook(self._hook(index), with_kwargs=True).remove)
            yield

    def _see(self, module: torch.nn.Module, args: BlockArgs) -> None:
        self._between = args[0].float()

    def _hook(self, index: int) -> Callable[[torch.nn.Module, BlockArgs, dict[str, object], BlockOutput], None]:
        def measure(module: torch.nn.Module, args: BlockArgs, kwargs: dict[str, object], output: BlockOutput) -> None:
            other = block_input(args, kwargs) if self.first else block_output(output)
            turned = (1 - cosine(self._between, other.float())).masked_fill(~self._real, 0)
            self.changes[-1][:, index] = check_finite(turned.double().sum(1).numpy(), index)

        return measure


class HealedPartTrials(HealedTrials):
    """As HealedTrials; what makes up for a part is the matrix by which the block's other part writes."""

    blocks: Parts

    def _gap(self, removed: Sequence[int], candidate: int) -> Gap:
        return Gap(candidate, candidate + 1)

    def _last_matrix(self, index: int) -> Target:
        other = next(part.module for name, part in PARTS.items() if name != self.blocks.part)
        with self.blocks.without([index]):  # attention writes into the feed-forward part, too, as long as that is there
            return last_matrix(self.blocks, index, self._ids, within=f"{other}.")

    def _streams(
        self, ids: torch.Tensor, removed: Sequence[int], gaps: dict[int, Gap], targets: dict[int, Target]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        with self.blocks.without(removed):
            entering = self.blocks.states(ids, sorted(gaps))
        found = dict[int, tuple[torch.Tensor, torch.Tensor]]()
        for index in gaps:  # each computes its own block once more, without the part
            with self.blocks.entering(index, entering[index]), self.blocks.without([*removed, index]):
                found |= super()._streams(ids, [], {index: gaps[index]}, targets)
        return found


def silence(source: Checkpoint, out: Path, part: str, removed: Sequence[int]) -> None:
    """Write ``source`` with zeros for the matrices and biases of the parts of the blocks ``removed``; all else keeps its bytes."""
    source.rewrite(out, lambda name: name)
    carry_files(source.path, out, source.trust_remote_code)
    write_json(out / "config.json", source.raw_config)
    gone = [part_name(index, part) for index in removed]
    parameters = source.meta_model().named_parameters()
    zeros = {name: torch.zeros(p.shape) for name, p in parameters if within(gone, name) and (p.ndim == 2 or name.endswith(".bias"))}
    replace_tensors(out, zeros)
