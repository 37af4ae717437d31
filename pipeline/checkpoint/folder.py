"""Checkpoint: one folder of weights and everything that is known of it, read when asked for and once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from edgepress.models.pruned_config import layer_count_key
from edgepress.pipeline import model_files
from edgepress.pipeline.checkpoint.load import build_meta_model, build_model, read_config
from edgepress.pipeline.checkpoint.offloaded import build_offloaded_model
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.text.windows import context_length, load_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder, float or packed, quantized by us or by another library.

    trust_remote_code: whether Python code in the folder may run. original: the float checkpoint of a third-party GPTQ
    folder with ambiguous zero points. Reading raises ModelError for what is missing or damaged. What was read is kept: make a
    new Checkpoint of a folder whose files have changed.
    """

    path: Path
    trust_remote_code: bool = False
    original: Path | None = None

    @cached_property
    def raw_config(self) -> JsonObject:
        """The content of config.json."""
        return model_files.read_config(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """config.json with the defaults that transformers adds."""
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
    def index(self) -> ShardIndex:
        """Where each tensor of the float weights lies."""
        return ShardIndex.of(self.path)

    @cached_property
    def weights(self) -> Weights:
        """All weights by name, float or packed."""
        return Weights(self.path, self.original, self.index)

    def matrix(self, module: str) -> PackedLinear | np.ndarray:
        """The matrix of a linear module or embedding: packed, or float32 (out, in)."""
        return self.weights.matrix(module)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in the files of the float weights."""
        return self.index.shapes

    def tensor(self, name: str) -> torch.Tensor | None:
        """One tensor as it is stored, None where the files have no such name."""
        return self.index.tensor(name) if name in self.index else None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as it is stored, file by file. Raises ModelError for NaN and Inf."""
        return self.index.tensors()

    def model(self) -> PreTrainedModel:
        """The torch model, float32 on the CPU, in evaluation mode; packed matrices dequantized."""
        return build_model(self.config, self.weights, self.trust_remote_code)

    def offloaded_model(self) -> PreTrainedModel:
        """What ``model`` returns, bit for bit, in the memory of its largest matrix."""
        return build_offloaded_model(self.config, self.weights, self.trust_remote_code)

    def meta_model(self) -> PreTrainedModel:
        """The module tree without weights: names and shapes, in no memory."""
        return build_meta_model(self.config, self.path, self.trust_remote_code)
