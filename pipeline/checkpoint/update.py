"""Changes to a checkpoint's files: tensors replaced, other files carried over."""

from __future__ import annotations

import re
import shutil
from collections.abc import Container
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.dtypes import dtype_of
from edgepress.pipeline.checkpoint.shards import INDEX, rows_of, shards
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, is_measurement, link_or_copy, read_json, write_json
from edgepress.pipeline.text.tokenizer import write_tokenizer
from safetensors.torch import load_file, save_file
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|onnx|data|gguf|h5|msgpack)$|.*\.index\.json$")
CARRIED_SUFFIXES = {".json", ".model", ".jinja"}
CARRIED_NAMES = {"merges.txt", "vocab.txt", "LICENSE"}
# Files that describe the former weights.
NOT_CARRIED = {
    "manifest.json",
    "config.json",
    "quantize_config.json",
    "training.json",
    "influence.json",
    "former_ids.json",
    "kept_channels.json",
}


def carry_files(source: Path, out: Path, trusted: bool) -> None:
    """Copy what belongs to a checkpoint besides its weights and config: tokenizer, chat template, generation config, licence.

    trusted: carry its Python code, too. Else what would make transformers run code is left out of its JSON files. The tokenizer's
    files are completed by what transformers knows beyond them.
    """
    for file in sorted(source.iterdir()):
        carried = file.suffix in CARRIED_SUFFIXES or file.name in CARRIED_NAMES or (trusted and file.suffix == ".py")
        if not (file.is_file() and carried) or WEIGHTS.match(file.name) or file.name in NOT_CARRIED or is_measurement(file):
            continue
        content = read_json(file) if file.name.endswith("_config.json") and not trusted else {}
        if "auto_map" in content:
            write_json(out / file.name, without_code(content))
        else:
            shutil.copy2(file, out / file.name)
    write_tokenizer(source, out)


def without_code(content: JsonObject) -> JsonObject:
    """A tokenizer, processor or generation config that names no code; a tokenizer of the code's own class becomes a plain one.

    Its tokens and merges are in tokenizer.json, which edgepress reads, and which transformers then reads, too.
    """
    plain = {key: value for key, value in content.items() if key != "auto_map"}
    if "tokenizer_class" in plain and tokenizer_class_from_name(str(plain["tokenizer_class"])) is None:
        plain["tokenizer_class"] = "PreTrainedTokenizerFast"
    return plain


def link_weights(source: Path, out: Path) -> None:
    """The weights of ``source`` as a second name of the same files, which nothing may change in place from then on."""
    index = source / INDEX
    for file in (*shards(source), *([index] if index.is_file() else [])):
        link_or_copy(file, out / file.name)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The type of every tensor in a checkpoint's files."""
    return {name: dtype_of(name, entry.dtype) for name, entry in rows_of(folder).items()}


def stored_dtype(dtypes: dict[str, torch.dtype], name: str, folder: Path) -> torch.dtype:
    """The type that a parameter has in the files. Raises ModelError."""
    return dtypes[_file_name(dtypes, name, folder)]


def _file_name(names: Container[str], name: str, folder: Path) -> str:
    """A parameter's name in the files: some omit the base model's prefix. Raises ModelError."""
    for known in (name, name.split(".", 1)[-1]):
        if known in names:
            return known
    raise ModelError(f"{folder} has no tensor '{name}'; save the model again with this transformers' save_pretrained")


def replace_tensors(folder: Path, changed: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Put changed tensors into the checkpoint's files, in ``dtype`` or the type that each has there."""
    names = stored_dtypes(folder)
    new = {_file_name(names, name, folder): tensor for name, tensor in changed.items()}
    for shard in shards(folder):
        content = load_file(shard)
        if not content.keys() & new.keys():
            continue
        for name in content.keys() & new.keys():
            content[name] = new[name].to(dtype or content[name].dtype).contiguous()
        save_file(content, shard, metadata={"format": "pt"})
    if (index := folder / INDEX).is_file():  # tensors may have another size now
        listed = read_json(index)
        total = sum(entry.nbytes for entry in rows_of(folder).values())
        write_json(index, listed | {"metadata": listed.get("metadata", {}) | {"total_size": total}})
