"""A checkpoint folder as a torch model: its config, its module tree, its weights in float32."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.shards import rewrite, shapes_of, shards
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.checkpoint.weights import open_packed, read_tensors
from edgepress.pipeline.errors import ModelError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging


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
