"""Changes to a checkpoint's files: tensors replaced, other files carried over."""

from __future__ import annotations

import re
import shutil
from collections.abc import Container
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.dtypes import DTYPES
from edgepress.pipeline.checkpoint.shards import INDEX, rows_of, shards
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import link_or_copy
from safetensors.torch import load_file, save_file

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|onnx|data|gguf|h5|msgpack)$|.*\.index\.json$")
CARRIED_SUFFIXES = {".json", ".model", ".jinja", ".py"}
CARRIED_NAMES = {"merges.txt", "vocab.txt", "LICENSE"}
# Files that describe the former weights.
NOT_CARRIED = {"manifest.json", "config.json", "quantize_config.json", "training.json", "influence.json"}


def carry_files(source: Path, out: Path) -> None:
    """Copy what belongs to a checkpoint besides its weights and config: tokenizer, chat template, generation config, licence."""
    for file in sorted(source.iterdir()):
        carried = file.suffix in CARRIED_SUFFIXES or file.name in CARRIED_NAMES
        if file.is_file() and carried and not WEIGHTS.match(file.name) and file.name not in NOT_CARRIED:
            shutil.copy2(file, out / file.name)


def carry_weights(source: Path, out: Path, link: bool) -> None:
    """The weights of ``source`` as they are. link: as a second name of the same files, which nothing may change in place then."""
    index = source / INDEX
    for file in (*shards(source), *([index] if index.is_file() else [])):
        (link_or_copy if link else shutil.copy2)(file, out / file.name)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The type of every tensor in a checkpoint's files."""
    return {name: DTYPES[entry.dtype] for name, entry in rows_of(folder).items()}


def stored_dtype(dtypes: dict[str, torch.dtype], name: str, folder: Path) -> torch.dtype:
    """The type that a parameter has in the files. Raises ModelError."""
    return dtypes[_file_name(dtypes, name, folder)]


def _file_name(names: Container[str], name: str, folder: Path) -> str:
    """A parameter's name in the files: some omit the base model's prefix. Raises ModelError."""
    for known in (name, name.split(".", 1)[-1]):
        if known in names:
            return known
    raise ModelError(f"{folder} has no tensor '{name}'; save the model again with this transformers' save_pretrained")


def replace_tensors(folder: Path, changed: dict[str, torch.Tensor]) -> None:
    """Put changed tensors into the checkpoint's files, in the type that each has there."""
    names = stored_dtypes(folder)
    new = {_file_name(names, name, folder): tensor for name, tensor in changed.items()}
    for shard in shards(folder):
        content = load_file(shard)
        if not content.keys() & new.keys():
            continue
        for name in content.keys() & new.keys():
            content[name] = new[name].to(content[name].dtype).contiguous()
        save_file(content, shard, metadata={"format": "pt"})
