"""The torch model's logits over the texts of the proof, computed once and kept in files."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import OutputError, ProofError
from edgepress.pipeline.files import check_disk
from edgepress.pipeline.machine import large_blocks_given_back
from edgepress.pipeline.metrics.torch_scores import logits_of
from transformers import PreTrainedModel

ROWS = 64  # positions at a time: the logits of a window of a large vocabulary take a quarter of a gigabyte
LARGE = 50_000_000  # parameters; of a smaller model the memory is not worth a tenth of the time of an export


class ReferenceLogits:
    """Logits of ``model`` over ``windows`` and any other ids, kept in files in ``scratch``.

    They are on disk so that the torch model and an onnxruntime session never need memory at the same time, and so that
    every accuracy level is compared with the same ones.
    """

    def __init__(self, model: PreTrainedModel, windows: list[np.ndarray], scratch: Path) -> None:
        self.model, self.windows, self._scratch = model, windows, scratch

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Float32 (tokens, vocabulary) of every position of ids int64 (tokens,), mapped from a file."""
        file = self._scratch / f"{hashlib.sha256(ids.tobytes()).hexdigest()}.npy"
        if not file.exists():
            logits = logits_of(self.model, ids)
            try:
                np.save(file, logits)
            except OSError as error:
                raise OutputError(f"cannot write torch's logits to {self._scratch} ({error}); free some disk space") from error
        mapped: np.ndarray = np.load(file, mmap_mode="r")
        return mapped

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the logits of a window, averaged over the windows. Raises ProofError when it is 0."""
        spread = float(np.mean([_deviation(self.logits(ids)) for ids in self.windows]))
        if spread == 0:
            raise ProofError("all logits of the checkpoint are equal, so it is broken; give another one")
        return spread


@contextmanager
def reference_logits(model: PreTrainedModel, windows: list[np.ndarray], folder: Path) -> Iterator[ReferenceLogits]:
    """Reference logits whose files are in ``folder`` and deleted afterwards. Raises OutputError when the disk is too full."""
    check_disk(folder, 4 * sum(map(len, windows)) * model.config.get_text_config().vocab_size)
    with (
        large_blocks_given_back() if model.num_parameters() >= LARGE else nullcontext(),
        tempfile.TemporaryDirectory(prefix="proof-", dir=folder, ignore_cleanup_errors=True) as scratch,
    ):
        reference = ReferenceLogits(model, windows, Path(scratch))
        del model  # so that a caller who needs it no more can delete reference.model
        yield reference
    if Path(scratch).exists():
        raise OutputError(f"{scratch} cannot be deleted and must not ship; export again, to a local disk")


def _deviation(logits: np.ndarray) -> float:
    blocks = [slice(first, first + ROWS) for first in range(0, len(logits), ROWS)]
    mean = sum(logits[rows].sum(dtype=np.float64) for rows in blocks) / logits.size
    return float(np.sqrt(sum(np.square(logits[rows] - mean).sum() for rows in blocks) / logits.size))
