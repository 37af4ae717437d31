"""Modules that compute otherwise for a while."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint import forwards
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.forwards import by_onednn
from edgepress.pipeline.checkpoint.stream import Stream


@pytest.mark.parametrize("shape", [(24, 48), (2, 3, 48), (1, 0, 48), (48,)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    """But for the order of its sums, whatever the shape; of weights as they are at the time."""
    module = torch.nn.Linear(48, 130, bias=bias)
    x, model = torch.randn(*shape), torch.nn.Sequential(module)
    with torch.inference_mode(), by_onednn(model.modules()):
        assert "forward" in module.__dict__
        assert torch.equal(module(input=x), model(x))
        torch.testing.assert_close(model(x), torch.nn.functional.linear(x, module.weight, module.bias), rtol=1e-5, atol=1e-5)
        module.weight.zero_()
        assert torch.equal(model(x), (module.bias if bias else torch.zeros(130)).expand(*shape[:-1], 130))
    assert "forward" not in module.__dict__


def test_what_is_left_alone() -> None:
    """What is to be differentiated or cast, another type, another kind of module, and one that computes otherwise already."""
    module, half, patched = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).bfloat16(), torch.nn.Linear(4, 3)
    patched.forward = lambda x: x
    with by_onednn([module, half, patched, torch.nn.ReLU()]):
        assert "forward" not in half.__dict__ and patched(1) == 1
        x = torch.randn(2, 4, requires_grad=True)
        module(x).sum().backward()
        assert module.weight.grad is not None and x.grad is not None
        with torch.inference_mode(), pytest.raises(RuntimeError):  # as torch's own
            module(torch.ones(1, 4, dtype=torch.bfloat16))
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(torch.ones(1, 4)).dtype == torch.bfloat16


def test_what_goes_by_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a model computes block by block, whether its weights are in memory or read as they are needed."""
    ran, product = list[torch.nn.Module](), forwards._product
    monkeypatch.setattr(forwards, "_product", lambda module, input: (ran.append(module), product(module, input))[1])
    ids = np.arange(7)
    blocks = Blocks(Checkpoint(tiny).model())
    linears = [module for module in blocks.model.modules() if isinstance(module, torch.nn.Linear)]
    ran.clear()
    blocks.logits(torch.from_numpy(ids)[None])
    assert set(ran) == set(linears) and len(ran) == len(linears)

    stream = Stream(Checkpoint(tiny), [ids])
    with stream.block() as block:
        ran.clear()
        stream.advance()
        assert set(ran) == {module for module in block.modules() if isinstance(module, torch.nn.Linear)}
