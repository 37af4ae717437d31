"""The arrays of a checkpoint by name, read when asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.shards import Places
from edgepress.pipeline.errors import ModelError
from safetensors import SafetensorError, safe_open

TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Tensors:
    """Name -> torch tensor over several safetensors files. Raises ModelError for a damaged file or a missing name."""

    def __init__(self, shards: list[Path]) -> None:
        for shard in shards:
            try:
                with safe_open(shard, "pt"):  # it checks types, shapes and places against each other
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{shard} is damaged or cut short ({error}); fetch or build it again") from error
        self._places = Places(shards)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return self._places.names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._places:
            raise ModelError(f"the checkpoint lacks {name}; fetch it again")
        content, kind, shape = self._places.read(name)
        if kind not in TYPES:
            raise ModelError(f"{name} is of the type {kind}, which cannot be read; convert the checkpoint to bfloat16 first")
        return torch.frombuffer(content, dtype=TYPES[kind]).reshape(shape) if content else torch.empty(shape, dtype=TYPES[kind])
