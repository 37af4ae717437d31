"""Checkpoint folders, float or packed: their weights as torch models, and the files that travel beside the weights."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline import packed
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.importers import open_quantized
from edgepress.pipeline.importers.bnb import BnbFolder
from edgepress.pipeline.importers.gptq import GptqFolder
from edgepress.pipeline.importers.tensors import Tensors
from edgepress.pipeline.packed import PackedFile
from edgepress.pipeline.shards import header, rewrite
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|onnx|data|gguf|h5|msgpack)$|.*\.index\.json$")
CARRIED_SUFFIXES = {".json", ".model", ".jinja", ".py"}
CARRIED_NAMES = {"merges.txt", "vocab.txt", "LICENSE"}
# Left behind: what describes the former weights.
NOT_CARRIED = {"manifest.json", "config.json", "quantize_config.json", "training.json", "influence.json"}


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint. Raises ModelError for one that this transformers does not know."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):  # we read another's packed matrices ourselves; nobody else shall
            del config.quantization_config
        return config
    except Exception as error:  # config classes raise what they like, of no common base
        raise ModelError(
            f"{folder / 'config.json'} cannot be read ({_first_line(error)}); correct it, or install a transformers that knows it"
        ) from error


def load_model(folder: Path, trust_remote_code: bool = False, original: Path | None = None) -> PreTrainedModel:
    """The model in float32 on the CPU, in evaluation mode; packed matrices, ours or another's, dequantized.

    original: see ``open_packed``. Everything is measured and proven in float32, whatever the checkpoint's dtype:
    bfloat16 noise would hide what a stage lost. Raises ModelError when weights are damaged, missing or of the wrong shape.
    """
    config = read_config(folder, trust_remote_code)
    file = open_packed(folder, original)
    state = {name: tensor.float() for name, tensor in read_tensors(folder) if file is None or name not in file.parts}
    with quiet():
        try:
            empty = meta_model(folder, trust_remote_code)
            if file is not None:
                turned = {name for name, module in empty.named_modules() if isinstance(module, Conv1D)}
                weights = {name: torch.from_numpy(file[name].dequantized()) for name in file}
                state |= {f"{n}.weight": w.T.contiguous() if n in turned else w for n, w in weights.items()}
            model, info = type(empty).from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"the weights in {folder} do not fit its config.json ({_reason(error)}); fetch both again") from error
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights, {sorted(info['missing_keys'])[0]} for one; give the complete checkpoint")
    return model.eval()


def meta_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module tree of a checkpoint without its weights: names and shapes, in no memory. Raises ModelError."""
    config = read_config(folder, trust_remote_code)
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json ({_first_line(error)}); fetch both again") from error
    return model


def open_packed(folder: Path, original: Path | None = None) -> PackedFile | GptqFolder | BnbFolder | None:
    """The packed matrices of a folder, ours or another's; None for a float one.

    original: the float checkpoint that another's was made from, to tell what its values leave open. Raises ModelError.
    """
    if (folder / packed.FILE).is_file():
        return PackedFile(folder)

    def weight(name: str) -> np.ndarray | None:
        tensor = None if original is None else read_tensor(original, f"{name}.weight")
        return None if tensor is None else tensor.float().numpy()

    return open_quantized(folder, shards(folder), None if original is None else weight)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every float tensor of a checkpoint, shard by shard. Raises ModelError for a damaged file."""
    for shard in shards(folder):
        tensors = Tensors([shard])
        for name in sorted(tensors.names):
            tensor = tensors[name]
            if tensor.is_floating_point() and not torch.isfinite(tensor.float().sum(dtype=torch.float64)):
                raise ModelError(f"{name} in {shard} holds NaN or Inf; the checkpoint is broken there, fetch it again")
            yield name, tensor


def read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    """One tensor of a checkpoint, None where it has no such name."""
    for shard in shards(folder):
        if name in header(shard)[0]:
            return Tensors([shard])[name]
    return None


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and place of every tensor, from the headers alone. Raises ModelError for a damaged file."""
    return {name: row for shard in shards(folder) for name, row in header(shard)[0].items() if name != "__metadata__"}


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint. Raises ModelError for a damaged file."""
    return {name: tuple(row["shape"]) for name, row in rows_of(folder).items()}


def check_names(folder: Path, model: PreTrainedModel, matrices: dict[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the checkpoint holds the model, and every one of ``matrices`` under its name and in its shape.

    The headers decide where names are the modules' own; else the checkpoint is loaded, which tells what is missing.
    """
    known = shapes_of(folder)
    wanted = {name for name, _ in model.named_parameters()}
    if wanted - set(known):
        load_model(folder)
    why = "" if matrices else "its blocks have no matrices of a known kind"
    if absent := {f"{name}.weight" for name in matrices} - set(known):
        why = f"its weights lack {min(absent)} under that name"
    if why:
        raise ModelError(
            f"{folder} cannot be quantized yet ({why}); load it and save it once with transformers, or use --method none"
        )
    for name, parameter in model.named_parameters():
        if name in known and known[name] != tuple(parameter.shape):
            raise ModelError(
                f"the weights in {folder} do not fit its config.json ({name} is {known[name]}, not {tuple(parameter.shape)}); "
                "fetch both again"
            )


@contextmanager
def with_full_names(folder: Path, model: PreTrainedModel, out: Path) -> Iterator[Path]:
    """The checkpoint with the modules' full names: itself, or a copy of a base model's ("h.0..." for "transformer.h.0...").

    The copy lives below ``out`` and is gone afterwards.
    """
    prefix = model.base_model_prefix + "."
    wanted = {name for name, _ in model.named_parameters()}
    known = set(shapes_of(folder))
    if not any(name not in wanted and prefix + name in wanted for name in known):
        yield folder
        return
    copy = out / "full-names"
    copy.mkdir()
    try:
        carry_files(folder, copy)
        shutil.copy2(folder / "config.json", copy)
        rewrite(shards(folder), copy, lambda name: prefix + name if prefix + name in wanted else name)
        yield copy
    finally:
        shutil.rmtree(copy)


def shards(folder: Path) -> list[Path]:
    """The safetensors files with float weights."""
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != packed.FILE)
    indexed = sorted(folder.glob("model*.safetensors"))
    return indexed or found


def carry_files(source: Path, out: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights and config: tokenizer, chat template, generation config, licence."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in CARRIED_SUFFIXES or file.name in CARRIED_NAMES
        if file.is_file() and wanted and not WEIGHTS.match(file.name) and file.name not in NOT_CARRIED:
            shutil.copy2(file, out / file.name)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of the decoder blocks: the one ModuleList as long as the config's layer count. Raises ModelError."""
    count = model.config.num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    # Experts or heads may be as many as layers: the outermost list is the blocks'.
    lists = [pair for pair in lists if not any(pair[0].startswith(other + ".") for other, _ in lists)]
    if len(lists) != 1:
        raise ModelError(
            f"cannot tell the decoder blocks of {type(model).__name__}: it keeps no one list of them; give a model of another kind"
        )
    return lists[0]


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear | Conv1D]:
    """The linear layers inside the decoder blocks, by full name; GPT-2's Conv1D holds its weight as (in, out)."""
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{n}": m for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}


def block_matrices(model: PreTrainedModel) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Name -> (out, in) of the linear layers inside the blocks, and the names of those that are stored as (in, out)."""
    linears = block_linears(model)
    transposed = frozenset(name for name, module in linears.items() if isinstance(module, Conv1D))
    shapes = {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in linears.items()}
    return {name: (b, a) if name in transposed else (a, b) for name, (a, b) in shapes.items()}, transposed


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; our own log says what matters."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    # transformers refers to a report that goes to its log
    return "a shape differs" if "ignore_mismatched_sizes" in str(error) else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
