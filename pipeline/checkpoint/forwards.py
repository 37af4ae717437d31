"""Modules of a torch model that compute otherwise for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch


@contextmanager
def replaced(forwards: Mapping[torch.nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Within the context these run in place of the modules' own; contexts may be nested, and hooks that stand there come back."""
    former = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in former.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextmanager
def by_onednn(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the context linear layers in float32 on the CPU multiply by oneDNN, for what need not be differentiated or cast.

    torch brings it along, and asks MKL, which takes up to three times as long on an EPYC for few rows, or many outputs as a head
    has (benchmarks/products.py); Intel's processors were not tried.
    """
    linears = [module for module in modules if type(module) is torch.nn.Linear and "forward" not in module.__dict__]
    on_cpu = [module for module in linears if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32]
    with replaced({module: partial(_product, module) for module in on_cpu if torch.backends.mkldnn.is_available()}):
        yield


def _product(module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """``input`` may be given by name, as to torch's own."""
    # it has no derivative, and no cast
    if input.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(input, module.weight, module.bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, module.weight, module.bias, "none", [], "")
    return product
