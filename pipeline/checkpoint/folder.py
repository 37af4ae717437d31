"""Checkpoint: one folder of weights and everything that is known of it, read when asked for and once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from edgepress.models.config import layer_count_key
from edgepress.pipeline.checkpoint.load import load_model, meta_model, read_config
from edgepress.pipeline.checkpoint.offloaded import offloaded_model
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.files import JsonObject, read_json
from edgepress.pipeline.text.windows import context_length, load_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder, float or packed, ours or quantized by others.

    trust_remote_code: whether Python code in the folder may run. original: the float checkpoint of a third-party GPTQ
    folder with ambiguous zero points. Reading raises ModelError for what is missing or damaged.
    """

    path: Path
    trust_remote_code: bool = False
    original: Path | None = None

    @cached_property
    def raw_config(self) -> JsonObject:
        """config.json as it is written."""
        return read_json(self.path / "config.json")

    @cached_property
    def config(self) -> PreTrainedConfig:
        """config.json as transformers completes it."""
        return read_config(self.path, self.trust_remote_code)

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.raw_config[layer_count_key(self.raw_config)])

    @property
    def context(self) -> int:
        """Tokens in a window: the model's context, at most text.windows.LONGEST_WINDOW."""
        return context_length(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without transformers."""
        return load_tokenizer(self.path)

    @cached_property
    def weights(self) -> Weights:
        """All weights by name, float or packed."""
        return Weights(self.path, self.original)

    def matrix(self, module: str) -> PackedLinear | np.ndarray:
        """The matrix of a linear module or embedding: packed, or float32 (out, in)."""
        packed = self.weights.packed(module)
        return self.weights.array(f"{module}.weight") if packed is None else packed

    def model(self) -> PreTrainedModel:
        """The torch model, float32 on the CPU, in evaluation mode; packed matrices dequantized."""
        return load_model(self.path, self.trust_remote_code, self.original)

    def offloaded_model(self) -> PreTrainedModel:
        """What ``model`` gives, bit for bit, in the memory of its largest matrix."""
        return offloaded_model(self.path, self.trust_remote_code, self.original)

    def meta_model(self) -> PreTrainedModel:
        """The module tree without weights: names and shapes, in no memory."""
        return meta_model(self.path, self.trust_remote_code)
