"""The original as people run it: plain transformers on torch, with its cache; only a measuring process of its own imports this."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.bench.jobs import SpeedJob
from edgepress.pipeline.checkpoint.load import build_meta_model, quiet, read_config
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel


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
