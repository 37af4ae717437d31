"""Checkpoint folders, float or packed: their weights as torch models, and the files that travel beside the weights."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from edgepress.pipeline import packed
from edgepress.pipeline.errors import ModelError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|onnx|data|gguf|h5|msgpack)$|.*\.index\.json$")
CARRIED_SUFFIXES = {".json", ".model", ".jinja", ".py"}
CARRIED_NAMES = {"merges.txt", "vocab.txt", "LICENSE"}
# Left behind: what describes the former weights.
NOT_CARRIED = {"manifest.json", "config.json", "quantize_config.json", "training.json", "influence.json"}


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint. Raises ModelError for one that this transformers does not know."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes raise what they like, of no common base
        raise ModelError(
            f"{folder / 'config.json'} cannot be read ({_first_line(error)}); correct it, or install a transformers that knows it"
        ) from error


def load_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model in float32 on the CPU, in evaluation mode; packed matrices dequantized.

    Everything is measured and proven in float32, whatever the checkpoint's dtype: bfloat16 noise would hide
    what a stage lost. Raises ModelError when weights are damaged, missing or of the wrong shape.
    """
    state = {name: tensor.float() for name, tensor in read_tensors(folder)}
    if (folder / packed.FILE).is_file():
        file = packed.PackedFile(folder)
        state |= {f"{name}.weight": torch.from_numpy(file[name].dequantized()) for name in file}
    with quiet():
        try:
            config = read_config(folder, trust_remote_code)
            model, info = model_class(config, trust_remote_code).from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"the weights in {folder} do not fit its config.json ({_reason(error)}); fetch both again") from error
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights, {sorted(info['missing_keys'])[0]} for one; give the complete checkpoint")
    return model.eval()


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that transformers chooses for a config."""
    with torch.device("meta"):  # the module tree alone, no memory for weights
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every float tensor of a checkpoint, shard by shard. Raises ModelError for a damaged file."""
    for shard in shards(folder):
        try:
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor.float().sum(dtype=torch.float64)):
                        raise ModelError(f"{name} in {shard} holds NaN or Inf; the checkpoint is broken there, fetch it again")
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard} is damaged or cut short ({error}); fetch or build it again") from error


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


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers inside the decoder blocks, by full name."""
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{n}": m for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)}


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
