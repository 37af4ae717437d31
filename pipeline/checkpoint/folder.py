"""Checkpoint: one folder of weights and everything that is known of it, read when asked for and once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from edgepress.models.pruned_config import layer_count_key
from edgepress.pipeline import model_files
from edgepress.pipeline.checkpoint.load import build_meta_model, build_model, read_folder
from edgepress.pipeline.checkpoint.offloaded import build_offloaded_model
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.parts import silent_parts, within
from edgepress.pipeline.checkpoint.reading import Reading
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.text.windows import context_length, load_tokenizer, vocabulary
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger("edgepress")


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
    def reading(self) -> Reading:
        """Config and weights as transformers takes them together, and what it leaves aside."""
        return read_folder(self.path, self.trust_remote_code, self.original)

    @cached_property
    def raw_config(self) -> JsonObject:
        """The content of config.json; a head that it wrongly calls tied is called untied, as it is read."""
        content = model_files.read_config(self.path)
        return content | {"tie_word_embeddings": False} if self.reading.untied else content

    @property
    def config(self) -> PreTrainedConfig:
        """config.json with the defaults that transformers adds, and what the weights decide."""
        return self.reading.config

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        content = model_files.read_config(self.path)
        return int(content[layer_count_key(content)])

    @cached_property
    def silent(self) -> frozenset[str]:
        """Names of the parts of blocks that write nothing, as ``model.layers.3.self_attn``: see parts.py."""
        return silent_parts(self.weights, self.config)

    def spared(self, matrices: Iterable[str]) -> frozenset[str]:
        """Which of the block matrices no quantizer takes: those that have codes already, and those of silent parts."""
        return frozenset(name for name in matrices if name in self.weights.matrices or within(self.silent, name))

    @property
    def context(self) -> int:
        """Tokens in a window: the model's context, at most text.windows.LONGEST_WINDOW."""
        return context_length(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without transformers."""
        return load_tokenizer(self.path)

    @property
    def index(self) -> ShardIndex:
        """Where each tensor of the float weights lies."""
        return self.weights.index

    @property
    def weights(self) -> Weights:
        """All weights that the model uses, by name, float or packed."""
        return self.reading.weights

    def matrix(self, module: str) -> PackedLinear | np.ndarray:
        """The matrix of a linear module or embedding: packed, or float32 (out, in)."""
        return self.weights.matrix(module)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in the files of the float weights that the model uses."""
        return {name: self.index[name].shape for name in self.weights.stored}

    def tensor(self, name: str) -> torch.Tensor | None:
        """One tensor as it is stored, None where the files have no such name."""
        return self.index.tensor(name) if name in self.index else None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every float weight as it is stored, file by file. Raises ModelError for NaN and Inf in a parameter."""
        return self.weights.floats()

    def rewrite(self, out: Path, rename: Callable[[str], str | None]) -> int:
        """``ShardIndex.rewrite`` of what the model uses: all else is left behind."""
        used = self.weights.stored
        return self.index.rewrite(out, lambda name: rename(name) if name in used else None)

    def remarks(self, stage: str) -> JsonObject:
        """What in the folder does not fit together and is no obstacle: logged for a stage, returned for its manifest.

        Raises ModelError when weights, config or tokenizer cannot be read.
        """
        facts, rows = self.reading.facts(stage), vocabulary(self.path)
        beyond = {id: name for name, id in self.tokenizer.get_vocab().items() if rows is not None and id >= rows}
        if beyond:
            names = [beyond[id] for id in sorted(beyond)]
            log.info("%s: the embedding has %d rows, and the tokenizer knows more tokens: %s", stage, rows, ", ".join(names[:3]))
            facts["tokens_beyond_embedding"] = names
        return facts

    def model(self) -> PreTrainedModel:
        """The torch model, float32 on the CPU, in evaluation mode; packed matrices dequantized."""
        return build_model(self.config, self.weights, self.trust_remote_code)

    def offloaded_model(self) -> PreTrainedModel:
        """What ``model`` returns, bit for bit, in the memory of its largest matrix."""
        return build_offloaded_model(self.config, self.weights, self.trust_remote_code)

    def meta_model(self) -> PreTrainedModel:
        """The module tree without weights: names and shapes, in no memory."""
        return build_meta_model(self.config, self.path, self.trust_remote_code)
