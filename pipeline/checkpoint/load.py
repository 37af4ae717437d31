"""A checkpoint as a torch model: its config, its module tree, its weights in float32.

Whether Python code in the folder may run is decided before, in admission.py.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.admission import check_code
from edgepress.pipeline.checkpoint.reading import Reading, read_together
from edgepress.pipeline.checkpoint.weight_file import WeightFile, file_for, watch
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.documents import short_line, shown
from edgepress.pipeline.errors import EdgepressError, ModelError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.machine import large_blocks_given_back
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint. Raises ModelError for one that this transformers does not know, and for code not trusted."""
    check_code(folder, read_json(folder / "config.json"), trust_remote_code)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):  # we read third-party packed matrices ourselves; transformers must not
            del config.quantization_config
        return config
    except Exception as error:  # config classes raise what they like, of no common base
        raise ModelError(
            f"{folder / 'config.json'} cannot be read ({reason_of(error)}); correct it, or install a transformers that knows it"
        ) from error


def build_meta_model(config: PreTrainedConfig, folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module tree of a config without weights: names and shapes, in no memory. Raises ModelError that names ``folder``."""
    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception as error:  # what a model's class raises for a number that does not fit has no common base
        raise ModelError(
            f"transformers cannot make a model of {folder / 'config.json'} ({_setting(config, error)}); correct it or replace it"
        ) from error
    return model


def build_model(config: PreTrainedConfig, weights: Weights, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config and its weights in float32 on the CPU, in evaluation mode; packed matrices are dequantized.

    Everything is measured and proven in float32, whatever the checkpoint's dtype: bfloat16 noise would hide what a stage
    lost. Where that is more than the memory that work may take, the weights lie in a file (``weight_file``).
    Raises ModelError when weights are damaged, missing or of the wrong shape.
    """
    folder = weights.folder
    empty = build_meta_model(config, folder, trust_remote_code)
    file = file_for(empty.num_parameters())

    # what transformers makes one of several of, experts for one, is not needed once it has
    parts, own = None if file is None else WeightFile(0), {name for name, _ in empty.named_parameters(remove_duplicate=False)}

    def placed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        home = file if name in own else parts
        return tensor.float() if home is None else home.put(tensor)

    with ExitStack() as stack:
        if file is not None:
            stack.enter_context(large_blocks_given_back())
        state = {name: placed(name, tensor) for name, tensor in weights.floats()}
        stack.enter_context(quiet())
        try:
            transposed = {name for name, module in empty.named_modules() if isinstance(module, Conv1D)}
            for module in weights.matrices:
                name = f"{module}.weight"
                weight = weights.tensor(name)
                state[name] = placed(name, weight.T.contiguous() if module in transposed else weight)
            model, info = type(empty).from_pretrained(
                None, config=copy.deepcopy(config), state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        except EdgepressError:
            raise
        except Exception as error:  # as above
            raise ModelError(f"the weights in {folder} do not fit its config.json ({_reason(error)}); replace either") from error
    if info["missing_keys"]:
        raise ModelError(f"{folder} lacks weights, {sorted(info['missing_keys'])[0]} for one; give the complete checkpoint")
    if file is not None:
        watch(model, file)
    return model.eval()


def read_folder(folder: Path, trust_remote_code: bool = False, original: Path | None = None) -> Reading:
    """Config and weights of a folder as transformers takes them together. Raises ModelError."""
    config = read_config(folder, trust_remote_code)
    return read_together(config, Weights(folder, original), build_meta_model(config, folder, trust_remote_code))


def load_model(folder: Path, trust_remote_code: bool = False, original: Path | None = None) -> PreTrainedModel:
    """``Checkpoint.model`` of a folder."""
    read = read_folder(folder, trust_remote_code, original)
    return build_model(read.config, read.weights, trust_remote_code)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; our own log reports what matters."""
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
    return "a shape differs" if "ignore_mismatched_sizes" in str(error) else reason_of(error)


def _setting(config: PreTrainedConfig, error: Exception) -> str:
    """``reason_of`` an error that a config caused, with the setting that it is about where the error does not name it."""
    settings = config.to_dict()
    if isinstance(error, KeyError) and error.args:  # its text is the value alone, as a name that is in no table
        every = [*settings.items(), *(pair for value in settings.values() if isinstance(value, dict) for pair in value.items())]
        if key := next((key for key, value in every if value == error.args[0]), None):
            return short_line(f"{key} is {shown(error.args[0])}, which it does not know")
    if "Padding_idx" in str(error):
        # a config of several parts may have neither
        token, size = (shown(getattr(config, key, None)) for key in ("pad_token_id", "vocab_size"))
        return short_line(f"pad_token_id is {token}, and vocab_size {size}")
    return reason_of(error)


def reason_of(error: BaseException) -> str:
    """The line of an error that says what is wrong: the first of the innermost cause, which others wrap in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return short_line(next((line for line in str(error).splitlines() if len(line.strip()) > 3), type(error).__name__))
