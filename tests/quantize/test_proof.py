"""Codes that came back from a library and were read wrongly are caught."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import pack, proof, rtn
from edgepress.pipeline.quantize.job import QuantizeJob


def off_by_one(linear: PackedLinear) -> PackedLinear:
    """Zero points read as the other format's."""
    zeros = np.full(linear.scales.shape, 1 << (linear.bits - 1)) if linear.zeros is None else linear.zeros
    return dataclasses.replace(linear, zeros=((zeros.astype(int) + 1) % (1 << linear.bits)).astype(np.uint8))


def in_wrong_order(linear: PackedLinear) -> PackedLinear:
    """Rows of act-order put back elsewhere."""
    return dataclasses.replace(linear, permutation=np.roll(np.arange(linear.shape[1]), 1).astype(np.int32))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("fault", [off_by_one, in_wrong_order])
def test_gptq_codes_read_wrongly_are_caught(
    fault: Callable[[PackedLinear], PackedLinear], bits: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes back from gptqmodel must be near what rounding gives, or the stage names the matrix and writes nothing."""
    wrong = "model.layers.2.self_attn.v_proj"

    def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
        found = rtn.quantize(job)
        return found | ({wrong: fault(found[wrong])} if spoil else {})

    monkeypatch.setattr(pack, "load", lambda _: quantize)
    monkeypatch.setattr(proof, "_ROWS_PROVEN", 16)  # of 32 to 96
    options = QuantizeOptions(method="gptqmodel", bits=bits, group_size=32)
    (tmp_path / "out").mkdir()
    spoil = False
    pack.quantize_checkpoint(Artifact.load(tiny), tmp_path / "out", options, tmp_path / "scratch")
    spoil = True
    with pytest.raises(ProofError, match=rf"^{re.escape(wrong)} was quantized with an error"):
        pack.quantize_checkpoint(Artifact.load(tiny), tmp_path / "out", options, tmp_path / "scratch")
