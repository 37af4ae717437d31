"""The arrays of a checkpoint by name, read when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from edgepress.pipeline.errors import ModelError
from safetensors import SafetensorError, safe_open


class Tensors:
    """Name -> torch tensor over several safetensors files. Raises ModelError for a damaged file or a missing name.

    A file is mapped as long as a tensor of it lives: what was read of a mapping counts as memory.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._where: dict[str, Path] = {}
        for shard in shards:
            with _opened(shard) as file:
                self._where |= dict.fromkeys(file.keys(), shard)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return set(self._where)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise ModelError(f"the checkpoint lacks {name}; fetch it again")
        with _opened(self._where[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, "pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{shard} is damaged or cut short ({error}); fetch or build it again") from error
