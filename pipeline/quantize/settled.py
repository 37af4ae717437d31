"""What the matrices of a block make once they are quantized: computed once for all passes over the block that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from edgepress.pipeline.checkpoint.forwards import by_onednn, replaced
from edgepress.pipeline.checkpoint.stream import Stream
from edgepress.pipeline.machine import memory_budget

KEPT = 1 << 30  # bytes, at most, and of what weights may take a part; the rest is computed again
_PART = 8


@contextmanager
def settled(stream: Stream) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Within the context, what to call with a module of the block in memory once neither it nor what it reads will change.

    The module, which makes one tensor, runs on every batch once more; what it makes then is kept for the passes after that. They
    get copies, for a model may write into what it gets.
    """
    budget = memory_budget()
    room = KEPT if budget is None else min(KEPT, budget // _PART)
    with ExitStack() as replacements:

        def settle(module: torch.nn.Module) -> None:
            made: dict[tuple[int, int], torch.Tensor] = {}  # by batch and call: experts run more than once a batch
            run, call = -1, 0
            with by_onednn([module]):  # as the stream multiplies
                forward = module.forward

            def once(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
                nonlocal room, run, call
                run, call = stream.runs, call + 1 if run == stream.runs else 0
                place = stream.batch, call
                if place not in made:
                    output: torch.Tensor = forward(*args, **kwargs)
                    if room < output.nbytes:
                        return output
                    room -= output.nbytes
                    made[place] = output
                return made[place].clone()

            replacements.enter_context(replaced({module: once}))

        yield settle
