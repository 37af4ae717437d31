"""packed.safetensors from a stranger: rows and arrays that do not fit each other are named."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from edgepress.pipeline.checkpoint.layout import PackedRow, check_arrays

ROW: dict[str, Any] = {"shape": (8, 48), "bits": 4, "group_size": 32, "codebook": None}


def arrays() -> dict[str, np.ndarray]:
    return {
        "codes": np.zeros((8, 2, 16), np.uint8),
        "scales": np.ones((8, 2), np.float32),
        "zeros": np.full((8, 2), 7, np.uint8),
        "permutation": np.arange(48, dtype=np.int32)[::-1],
    }


def test_what_quantizers_write_passes() -> None:
    check_arrays(PackedRow(**ROW), arrays())
    flat = {"codes": np.zeros(192, np.uint8), "scales": np.ones(6, np.float32)}
    check_arrays(PackedRow((8, 48), 4, 64, "nf4"), flat)
    assert asdict(PackedRow(**ROW)) == ROW


@pytest.mark.parametrize(
    "change", [{"shape": (0, 48)}, {"shape": (8, 1 << 40)}, {"group_size": 31}, {"codebook": "nf4", "bits": 8}, {"group_size": -32}]
)
def test_a_row_that_no_matrix_has(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        PackedRow(**ROW | change)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("codes", np.zeros((8, 2, 8), np.uint8)),
        ("codes", np.zeros((8, 2, 16), np.int8)),
        ("scales", np.ones(16, np.float32)),
        ("scales", np.ones((8, 2), np.float16)),
        ("zeros", np.full((8, 2), 16, np.uint8)),
        ("permutation", np.zeros(48, np.int32)),
        ("permutation", np.arange(48, dtype=np.int32) + 1),
    ],
)
def test_an_array_that_does_not_fit(name: str, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=name):
        check_arrays(PackedRow(**ROW), arrays() | {name: array})
