"""The arrays of a checkpoint by name, read when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from edgepress.pipeline.errors import ModelError
from safetensors import SafetensorError, safe_open


class Tensors:
    """Name -> torch tensor over several safetensors files. Raises ModelError for a damaged file or a missing name."""

    def __init__(self, shards: list[Path]) -> None:
        self._where: dict[str, Any] = {}
        for shard in shards:
            try:
                file = safe_open(shard, "pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{shard} is damaged or cut short ({error}); fetch or build it again") from error
            self._where |= {name: file for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return set(self._where)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise ModelError(f"the checkpoint lacks {name}; fetch it again")
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor
