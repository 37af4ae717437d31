"""A torch model larger than memory: each module's weights are in memory only while it runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module, attach_align_device_hook, remove_hook_from_module
from edgepress.pipeline.checkpoint.load import quiet, read_folder
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.documents import short_line
from edgepress.pipeline.errors import ModelError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


class _WithTiedNames(Mapping[str, torch.Tensor]):
    """Parameter name -> float32 tensor, read or dequantized when asked for; a tied head is the embedding."""

    def __init__(self, weights: Weights, tied: Mapping[str, str]) -> None:
        self._weights, self._tied, self._names = weights, tied, weights.names

    def stored(self, name: str) -> str:
        """The name under which the files hold a parameter."""
        return name if name in self._names else self._tied.get(name, name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights.tensor(self.stored(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.stored(name) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def build_offloaded_model(config: PreTrainedConfig, weights: Weights, trust_remote_code: bool = False) -> PreTrainedModel:
    """What ``build_model`` returns, bit for bit, in the memory of its largest matrix; every forward reads all weights again.

    For checkpoints whose tensors have the names of the modules, which the fused graph demands too. Raises ModelError
    when weights are damaged, missing or of the wrong shape.
    """
    folder = weights.folder
    for _ in weights.floats():  # raises for NaN and Inf
        pass
    try:
        # Buffers are computed by the constructors and must be real; the weights take no memory.
        with quiet(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.float32
            )
    except Exception as error:  # what a model's class raises for a number that does not fit has no common base
        raise ModelError(f"the weights in {folder} do not fit config.json ({short_line(str(error))}); replace either") from error
    by_name = _WithTiedNames(weights, model.all_tied_weights_keys or {})
    for name, parameter in model.named_parameters():
        if name not in by_name:
            raise ModelError(f"{folder} lacks weights, {name} for one; give the complete checkpoint")
        if weights.shape(by_name.stored(name)) != tuple(parameter.shape):
            raise ModelError(f"the weights in {folder} do not fit its config.json (a shape differs); replace either")
    buffers = dict(model.named_buffers())
    for name in model.state_dict().keys() & buffers.keys() & weights.names:  # those that are stored, a scale of a layer for one
        buffers[name].copy_(by_name[name])
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=by_name)
    return model.eval()


def settle(model: PreTrainedModel, weights: Weights, without: str) -> None:
    """Read what of an offloaded model is not in its module ``without`` into memory, for good; that module works no more.

    weights: those that ``build_offloaded_model`` had.
    """
    _read(model, weights, [name for name, _ in model.named_modules() if not f"{name}.".startswith(f"{without}.")])


@contextmanager
def in_memory(model: PreTrainedModel, weights: Weights, part: str) -> Iterator[None]:
    """Within the context the module ``part`` of an offloaded model has its weights in memory; after it, they are gone for good.

    weights: those that ``build_offloaded_model`` had.
    """
    names = [name for name, _ in model.named_modules() if f"{name}.".startswith(f"{part}.")]
    _read(model, weights, names)
    try:
        yield
    finally:
        for parameter in model.get_submodule(part).parameters():
            parameter.data = torch.empty(0)


def _read(model: PreTrainedModel, weights: Weights, names: Iterable[str]) -> None:
    """Read the weights of these modules, in place of the hooks that would read them at each call."""
    by_name, read = _WithTiedNames(weights, model.all_tied_weights_keys or {}), dict[str, torch.nn.Parameter]()
    for prefix in names:
        module = model.get_submodule(prefix)
        add_hook_to_module(module, ModelHook())  # in place of the one that reads; to remove that would read all
        remove_hook_from_module(module)
        if getattr(module.forward, "__func__", None) is type(module).forward:
            del module.forward  # left as the module's own
        for leaf in [leaf for leaf, parameter in module.named_parameters(recurse=False)]:
            stored = by_name.stored(f"{prefix}.{leaf}" if prefix else leaf)
            if stored not in read:
                read[stored] = torch.nn.Parameter(by_name[stored], requires_grad=False)
            setattr(module, leaf, read[stored])


def offloaded_model(folder: Path, trust_remote_code: bool = False, original: Path | None = None) -> PreTrainedModel:
    """``Checkpoint.offloaded_model`` of a folder."""
    read = read_folder(folder, trust_remote_code, original)
    return build_offloaded_model(read.config, read.weights, trust_remote_code)
