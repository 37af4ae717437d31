"""A torch model larger than memory: its weights stand there one module at a time, made anew whenever the module runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from edgepress.pipeline.checkpoint.load import quiet, read_config
from edgepress.pipeline.checkpoint.shards import shapes_of, shards
from edgepress.pipeline.checkpoint.tensors import Tensors
from edgepress.pipeline.checkpoint.weights import open_packed, read_tensors
from edgepress.pipeline.errors import ModelError
from transformers import AutoModelForCausalLM, PreTrainedModel


class _Weights(Mapping[str, torch.Tensor]):
    """Parameter name -> float32 tensor, read or dequantized when asked for; a tied head is the embedding."""

    def __init__(self, folder: Path, original: Path | None, tied: Mapping[str, str]) -> None:
        self._packed, self._tied = open_packed(folder, original), tied
        self._tensors, self._shapes = Tensors(shards(folder)), shapes_of(folder)
        parts = self._packed.parts if self._packed is not None else set()
        self._names = (self._tensors.names - parts) | {f"{name}.weight" for name in self._packed or ()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            name = self._tied.get(name, name)
        module = name.removesuffix(".weight")
        if self._packed is not None and module in self._packed:
            return torch.from_numpy(self._packed[module].dequantized())
        return self._tensors[name].float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of what ``[name]`` would give."""
        name = name if name in self._names else self._tied[name]
        module = name.removesuffix(".weight")
        if self._packed is not None and module in self._packed:
            return self._packed[module].shape
        return self._shapes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names or self._tied.get(str(name)) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def offloaded_model(folder: Path, trust_remote_code: bool = False, original: Path | None = None) -> PreTrainedModel:
    """What ``load_model`` gives, bit for bit, in the memory of its largest matrix; every forward reads all weights again.

    For checkpoints whose tensors have the names of the modules, which is what the fused graph asks for too. Raises ModelError
    when weights are damaged, missing or of the wrong shape.
    """
    config = read_config(folder, trust_remote_code)
    for _ in read_tensors(folder):  # raises for NaN and Inf
        pass
    try:
        # Buffers are computed by the constructors and must be real; the weights take no memory.
        with quiet(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json ({error}); fetch both again") from error
    weights = _Weights(folder, original, model.all_tied_weights_keys or {})
    for name, parameter in model.named_parameters():
        if name not in weights:
            raise ModelError(f"{folder} lacks weights, {name} for one; give the complete checkpoint")
        if weights.shape(name) != tuple(parameter.shape):
            raise ModelError(f"the weights in {folder} do not fit its config.json (a shape differs); fetch both again")
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    return model.eval()
