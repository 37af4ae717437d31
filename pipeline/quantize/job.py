"""What a quantizer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.shards import PACKED
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, read_json, remove, sha256, write_json
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.registry import versions

JOB = "job.json"  # in the scratch folder: what is being done there


@dataclass(frozen=True)
class QuantizeJob:
    """What a quantizer is given: the checkpoint, the matrices to quantize, and calibration windows.

    linears: full name -> (out, in). windows: called only by quantizers that calibrate. scratch: a folder that a quantizer
    may make next to the output; what an interrupted run leaves there is its own to resume from.
    exceptions: bits and group size of the matrices that have others than ``options`` gives. untouched: matrices of the
    blocks that stay as they are.
    transposed: those stored as (in, out). head: name, bits and group size of the output head, whose codes a quantizer
    that calibrates may return, too; None where they are not asked for. head_rows: those of its rows that are meant, one after
    another; empty for all.
    """

    checkpoint: Checkpoint
    linears: dict[str, tuple[int, int]]
    windows: Callable[[], list[np.ndarray]]
    options: QuantizeOptions
    scratch: Path
    exceptions: dict[str, tuple[int, int]] = field(default_factory=dict)
    untouched: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    head: tuple[str, int, int] | None = None
    head_rows: tuple[slice, ...] = ()

    def format(self, name: str) -> tuple[int, int]:
        """Bits and group size of one matrix."""
        return self.exceptions.get(name, (self.options.weight_bits, self.options.group))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, float32 torch tensor (out, in)) of every matrix, one at a time. Raises ModelError for NaN and Inf."""
        for name, tensor in self.checkpoint.tensors():
            module = name.removesuffix(".weight")
            if module in self.linears:
                yield module, (tensor.T if module in self.transposed else tensor).float().contiguous()


def chosen_rows(weight: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """Some rows of a matrix, one after another; all where none are named."""
    return torch.cat([weight[some] for some in rows]) if rows else weight


def taken_up(job: QuantizeJob, settings: JsonObject, *packages: str) -> bool:
    """Whether ``job.scratch`` holds what an interrupted run of the same job left; if not, it is made anew.

    settings: all that decides what the quantizer finds besides the model and the ``packages``, as JSON.
    """
    folder = job.checkpoint.path
    files = [*job.checkpoint.index.files, folder / "config.json", folder / PACKED]
    wanted: JsonObject = {
        "model": str(folder.resolve()),
        "files": {file.name: sha256(file) for file in files if file.is_file()},
        "trust_remote_code": job.checkpoint.trust_remote_code,
        "versions": versions(*packages),
        **settings,
    }
    try:
        left = read_json(job.scratch / JOB)
    except (InputError, OSError, RecursionError):
        left = None
    if left == wanted:
        return True
    remove(job.scratch)
    job.scratch.mkdir(parents=True)
    write_json(job.scratch / JOB, wanted)
    return False
