"""The original as people run it: plain transformers on torch, with its cache; only a measuring process of its own imports this."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.bench.jobs import SpeedJob
from edgepress.pipeline.checkpoint.load import build_meta_model, quiet, read_config
from edgepress.pipeline.errors import WorkerError
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

_UNDISTURBED = 0.8  # of the time; alone on a machine it is 0.99, beside one busy program 0.4


class TorchDecoder:
    """A model that reads token ids one piece after the other, as ``runtime.decoder.Decoder`` does."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Cache | None = None
        # As generate() does: logits of the last position alone, where the model can.
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._settings = {"use_cache": True} | ({"logits_to_keep": 1} if last else {})

    def reset(self) -> None:
        """Forget what was read."""
        self._cache = None

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Read ids (tokens,); returns float32 logits (positions, vocabulary), the last position's at least."""
        with torch.inference_mode():
            out = self._model(torch.from_numpy(ids)[None], past_key_values=self._cache, **self._settings)
        self._cache = out.past_key_values
        return np.asarray(out.logits[0].float().numpy())


def check_undisturbed(share: float) -> None:
    """Raise WorkerError where the thread that decodes had the processor for less than nearly all of the time.

    share: of the time that it took. Torch's threads spin until the last of them is done: beside one busy program two of them were
    40 times as slow as alone, where onnxruntime was half as fast. Such a figure would flatter what was made of the original.
    """
    if torch.get_num_threads() > 1 and share < _UNDISTURBED:
        raise WorkerError(
            f"other programs kept the processor busy ({100 * share:.0f} % of the time was left), which slows torch far more than "
            "onnxruntime; run edgepress bench again on a quiet machine"
        )


def loader(job: SpeedJob) -> Callable[[], TorchDecoder]:
    """What loads the original; all that it imports is loaded already, for that is not the model's time.

    Raises ModelError for a config that transformers does not know, and for code not trusted.
    """
    folder = Path(job.folder)
    build_meta_model(read_config(folder, job.trust_remote_code), folder, job.trust_remote_code)
    if job.threads:
        torch.set_num_threads(job.threads)

    def load() -> TorchDecoder:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=job.dtype, trust_remote_code=job.trust_remote_code, use_safetensors=True
            )
        return TorchDecoder(model.eval())

    return load
