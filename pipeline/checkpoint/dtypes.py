"""The element types of safetensors files in torch."""

from __future__ import annotations

import torch
from edgepress.pipeline.documents import shown
from edgepress.pipeline.errors import ModelError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def to_torch(name: str, content: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor ``name`` over its bytes, which are not copied. Raises ModelError for a type that torch lacks."""
    kind = dtype_of(name, dtype)
    if not content:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(content, dtype=kind).reshape(shape)


def dtype_of(name: str, dtype: str) -> torch.dtype:
    """The type of the tensor ``name``. Raises ModelError for one that torch lacks."""
    if dtype not in DTYPES:
        raise ModelError(f"{name} is of the type {shown(dtype)}, which cannot be read; convert the checkpoint to bfloat16 first")
    return DTYPES[dtype]
