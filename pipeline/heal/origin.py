"""Where a pruned checkpoint comes from: which layers it lacks, and whether the given original is the one they were removed from."""

from __future__ import annotations

import re

import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.documents import DocumentError, typed
from edgepress.pipeline.errors import ModelError, OptionError
from edgepress.pipeline.report.steps import Removal

_OUTSIDE_BLOCKS = re.compile(r"(?!.*\.\d+\.)(?!\d+\.)")  # names of tensors without a number


def kept_layers(source: Artifact, original: Checkpoint) -> list[int]:
    """Indices in ``original`` of the layers that ``source`` has, ascending.

    Raises ModelError when ``source`` was never pruned, OptionError when it was not pruned from a model of so many layers.
    """
    try:
        steps = [typed(Removal, step.facts, "prune") for step in source.steps if step.stage == "prune"]
    except DocumentError as error:
        raise ModelError(f"the manifest of {source.path} is damaged ({error}); prune again") from error
    if not steps:
        raise ModelError(f"the manifest of {source.path} does not name the layers removed; give a folder that prune wrote")
    kept = list(range(steps[-1].layers[1]))
    for removal in reversed(steps):  # a second removal counts layers among those that the first one kept
        before = [index for index in range(removal.layers[0]) if index not in removal.removed_layers]
        if len(before) != removal.layers[1] or any(index >= len(before) for index in kept):
            raise ModelError(f"the manifest of {source.path} is damaged (its layers do not add up); prune again")
        kept = [before[index] for index in kept]
        if removal.layers[0] == original.layers:
            return kept
    raise OptionError(
        f"{original.path} has {original.layers} layers, and {source.path} was not pruned from such a model; "
        "give the one that it was pruned from as --original"
    )


def check_original(source: Checkpoint, original: Checkpoint) -> None:
    """Compare what removal leaves alone, the tensors outside the blocks. Raises OptionError that names one that differs."""
    check_checkpoint(original.path, original.trust_remote_code)
    for name in filter(_OUTSIDE_BLOCKS.match, sorted(source.weights.names)):
        own, theirs = source.tensor(name), original.tensor(name)  # as stored: a packed original has none of that name
        if own is None or theirs is None or not torch.equal(own, theirs):
            raise OptionError(
                f"{original.path} is not what {source.path} was pruned from: {name} differs; "
                "give the one that it was pruned from as --original"
            )
