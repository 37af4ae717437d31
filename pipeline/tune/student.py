"""The quantized model as torch trains it: integer codes that nothing moves, times scales that are parameters.

Every packed matrix becomes a parametrization of its module's weight (torch.nn.utils.parametrize), so each module keeps its own
forward, whatever its class: Linear, Conv1D, an embedding that multiplies by a constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import CODEBOOKS, PackedLinear, in_half, unpack_bits
from edgepress.pipeline.checkpoint.parts import within
from edgepress.pipeline.checkpoint.weight_file import WeightFile, weight_file
from edgepress.pipeline.machine import training_device
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# A matrix of so many bits loses next to nothing, and training it would cost its dequantization at every step and add the noise
# of training: a step of a scale is larger than the error of its codes.
ENOUGH_BITS = 8


class Dequantized(torch.nn.Module):
    """scales (groups in order) -> weight, the very arithmetic of ``PackedLinear.dequantized``.

    The codes are a buffer of integers (of codebook entries for nf4 and fp4) and never get a gradient.
    """

    values: torch.Tensor
    columns: torch.Tensor | None

    def __init__(self, packed: PackedLinear, transposed: bool) -> None:
        super().__init__()
        self.packed_shape, self.transposed, self.scales = packed.shape, transposed, torch.from_numpy(np.array(packed.scales))
        self.register_buffer("values", _values(packed))
        order = None if packed.permutation is None else torch.from_numpy(np.argsort(packed.permutation))
        self.register_buffer("columns", order)

    def forward(self, scales: torch.Tensor) -> torch.Tensor:
        """The weight as its module stores it, float32: (out, in), or (in, out) of a Conv1D."""
        rows, columns = self.packed_shape
        flat = self.values * scales[..., None]
        weight = flat.reshape(-1)[: rows * columns].view(rows, columns) if flat.ndim == 2 else flat.view(rows, -1)[:, :columns]
        if self.columns is not None:
            weight = weight[:, self.columns]
        return weight.T if self.transposed else weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What ``parametrize`` stores in place of the weight: the scales, (out, groups), or (groups,) with a codebook."""
        return self.scales


def _values(packed: PackedLinear) -> torch.Tensor:
    """What the scales are multiplied by: integers (out, groups, group size), or codebook entries (groups, group size)."""
    if packed.codebook:
        entries = CODEBOOKS[packed.codebook][packed.unpacked()].reshape(-1)
        padded = np.zeros(len(packed.scales) * packed.group_size, dtype=np.float32)
        padded[: entries.size] = entries
        return torch.from_numpy(padded.reshape(-1, packed.group_size))
    codes = unpack_bits(packed.codes, packed.bits, packed.group_size).astype(np.int16)
    zeros = np.int16(1 << (packed.bits - 1)) if packed.zeros is None else packed.zeros[..., None].astype(np.int16)
    values = codes - zeros
    small = packed.bits < 8 or packed.zeros is None  # an asymmetric 8-bit code may be 255 from its zero point
    return torch.from_numpy(values.astype(np.int8) if small else values)


def _recompute(model: PreTrainedModel) -> None:
    """Let a block be computed once more for its gradients, so that what it dequantizes is not kept until then.

    By what transformers has for training. The blocks alone count as in training: what is in them still drops nothing out.
    """
    _, blocks = decoder_blocks(model)
    for block in blocks:
        vars(block).update(
            training=True, gradient_checkpointing=True, _gradient_checkpointing_func=partial(checkpoint, use_reentrant=False)
        )


class Student:
    """A quantized checkpoint in memory with its scales, norms and biases to train; everything else is frozen.

    model: float32 on ``training_device``, in evaluation mode. matrices: names of the packed modules whose scales are trained.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.model: PreTrainedModel = source.model()
        self.model.requires_grad_(False)
        if (file := weight_file(self.model)) is not None:
            _recompute(self.model)
        self._packed = {name: source.weights.packed(name) for name in sorted(source.weights.matrices)}
        self.matrices = [name for name, packed in self._packed.items() if packed and packed.bits < ENOUGH_BITS]
        for name in self.matrices:
            self._parametrize(name, file)
        for name, parameter in self.model.named_parameters():
            kind = name.endswith("weight.original") or (parameter.ndim == 1 and parameter.is_floating_point())
            parameter.requires_grad_(kind and not within(source.silent, name))  # what is gone must not come back as a bias
        self.model.to(training_device())

    def _parametrize(self, name: str, file: WeightFile | None) -> None:
        module, packed = self.model.get_submodule(name), self._packed[name]
        assert packed is not None
        weight, dequantized = module.weight, Dequantized(packed, isinstance(module, Conv1D))
        if file is not None:  # where the weights were
            dequantized.values = file.put(dequantized.values, dequantized.values.dtype)
        # The head of a tied model is the embedding's matrix: one set of scales serves both.
        sharing = [m for m in self.model.modules() if m._parameters.get("weight") is weight]
        for one in sharing:
            parametrize.register_parametrization(one, "weight", dequantized, unsafe=True)
            one.parametrizations.weight.original = module.parametrizations.weight.original
        del dequantized.scales

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Name and value of every trained parameter, each once, in the order of the model."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def round_scales(self) -> None:
        """Give every scale the number that the file will have."""
        for name in self.matrices:
            scales = self.model.get_submodule(name).parametrizations.weight.original
            with torch.no_grad():
                scales.copy_(torch.from_numpy(in_half(scales.detach().cpu().numpy())))

    def packed(self) -> dict[str, PackedLinear]:
        """All packed matrices with the present scales; codes and zero points are the very arrays that were read."""
        packed = {name: linear for name, linear in self._packed.items() if linear is not None}
        for name in self.matrices:
            scales = self.model.get_submodule(name).parametrizations.weight.original.detach().cpu().numpy().copy()
            packed[name] = replace(packed[name], scales=scales)
        return packed

    def floats(self) -> dict[str, torch.Tensor]:
        """The trained parameters that are no scales: norms and biases, by name."""
        return {name: p.detach().cpu().clone() for name, p in self.trained() if ".parametrizations." not in name}
