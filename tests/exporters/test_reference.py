"""The reference of the proof: the whole model's logits, in the memory of one matrix, never at the same time as a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from edgepress.exporters.proof import parity, reference
from edgepress.exporters.proof.reference import reference_logits
from edgepress.pipeline import machine, stages
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.offloaded import offloaded_model
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import ExportOptions, VerifyOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.verify.checks import verify

from .conftest import Made


@pytest.mark.parametrize("method", ["none", "rtn", "nf4"])
def test_a_streamed_model_is_the_loaded_one(method: str, make: Callable[..., Made], tiny: Path) -> None:
    """The proof's reference holds one matrix at a time, and its logits are the whole model's, bit for bit."""
    folder = make(tiny, method)[0].path
    ids = torch.arange(40)[None]
    streamed, whole = offloaded_model(folder), load_model(folder)
    with torch.inference_mode():
        for _ in range(2):  # what one forward drops the next finds again
            assert torch.equal(streamed(input_ids=ids).logits, whole(input_ids=ids).logits)
            assert all(parameter.device.type == "meta" for parameter in streamed.parameters())


def test_torch_and_onnxruntime_take_turns(fused: Made, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the proof and in `verify`: no session is open while torch computes, and between its turns torch holds no weight."""
    packed, exported = fused
    models, decoders, torch_ran, init = [], WeakSet(), [], Decoder.__init__

    def streamed(self: Checkpoint) -> object:
        models.append(offloaded_model(self.path))
        return models[-1]

    def opened(self: Decoder, *arguments: Any, **settings: Any) -> None:
        assert not [name for model in models for name, parameter in model.named_parameters() if not parameter.is_meta]
        init(self, *arguments, **settings)
        decoders.add(self)

    def computed(model: Any, ids: np.ndarray, keep: int = 0) -> np.ndarray:
        assert not decoders
        torch_ran.append(len(ids))
        return logits_of(model, ids, keep)

    monkeypatch.setattr(Checkpoint, "offloaded_model", streamed)
    for module in ("proof.reference", "proof.switch"):
        monkeypatch.setattr(f"edgepress.exporters.{module}.logits_of", computed)
    monkeypatch.setattr(Decoder, "__init__", opened)
    stages.run("export", packed, tmp_path / "onnx", ExportOptions(exporter="fused", text=text))
    windows = len(parity.proof_windows(text, packed.path))
    assert len(models) == 1 and len(torch_ran) == windows + 2 + 2  # two rows of a batch, and greedy tokens at both levels
    assert not list((tmp_path / "onnx").glob("proof*"))
    (check,) = [c for c in verify(exported.path, VerifyOptions(original=packed.path, text=text)) if c.name == "parity"]
    assert check.state == "ok" and len(models) == 2, check.detail


def test_the_proof_gives_its_memory_back(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are read and dropped one after the other; afterwards the allocator is left as it was."""
    bounds: list[int] = []
    monkeypatch.setattr(reference, "LARGE", 1000)
    monkeypatch.setattr(machine, "_set_threshold", bounds.append)
    with reference_logits(load_model(tiny), [np.arange(8)], tmp_path):
        assert bounds == [4 << 20]
    assert bounds == [4 << 20, 32 << 20]
