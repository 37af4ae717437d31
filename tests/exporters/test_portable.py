"""What cannot be traced."""

from __future__ import annotations

import pytest
import torch
from edgepress.exporters.portable import _one_line_errors
from edgepress.pipeline.errors import ModelError


class _Branching(torch.nn.Module):
    """Its path depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_traced_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch prints the graph so far, hundreds of lines for a model."""
    says = r"^this architecture cannot be traced to ONNX \(.*data-dependent.*\); choose"
    with pytest.raises(ModelError, match=says), _one_line_errors():
        torch.onnx.export(_Branching().eval(), (torch.ones(3),), dynamo=True, verbose=False)
    assert capfd.readouterr().err == ""
