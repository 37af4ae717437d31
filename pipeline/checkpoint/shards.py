"""Safetensors files: which hold a checkpoint's weights, where each tensor lies, and copies without loading."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import write_json

INDEX = "model.safetensors.index.json"
PACKED = "packed.safetensors"  # our own quantized matrices, beside the float weights
_PIECE = 16 << 20


def header(shard: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins. Raises ModelError when damaged or cut short."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            if 8 + length > size:
                raise ValueError("header beyond the end")
            content: dict[str, Any] = json.loads(file.read(length))
            rows = [row for name, row in content.items() if name != "__metadata__"]
            offsets = [offset for row in rows for offset in row["data_offsets"]]
            data = max(offsets, default=0)
            whole = all(isinstance(row["dtype"], str) and isinstance(row["shape"], list) for row in rows)
            if not whole or len(offsets) != 2 * len(rows) or not all(isinstance(offset, int) for offset in offsets):
                raise ValueError("tensors without type, shape or place")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{shard} is damaged or cut short, no safetensors file ({error}); fetch it again") from error
    if 8 + length + data != size:
        raise ModelError(f"{shard} is cut short: {size} bytes, its header promises {8 + length + data}; fetch it again")
    return content, 8 + length


class Places:
    """Where the tensors of safetensors files lie. Raises ModelError when a file is damaged.

    They are read, not mapped: of a mapped file, what was read once counts as memory until the last tensor of it is gone.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._rows: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for shard in shards:
            content, begin = header(shard)
            content.pop("__metadata__", None)
            self._rows |= {name: (shard, begin, row) for name, row in content.items()}

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def read(self, name: str) -> tuple[bytearray, str, list[int]]:
        """Bytes of a tensor, its type as safetensors calls it, and its shape."""
        shard, begin, row = self._rows[name]
        first, end = row["data_offsets"]
        content = bytearray(end - first)
        with shard.open("rb") as file:
            file.seek(begin + first)
            if file.readinto(content) != len(content):
                raise ModelError(f"{shard} is cut short; fetch or build it again")
        return content, row["dtype"], row["shape"]


def rewrite(sources: list[Path], out: Path, rename: Callable[[str], str | None]) -> int:
    """Copy every tensor that ``rename`` gives a name to into ``out``, one new shard a source; returns the bytes of tensors kept.

    Writes an index when there is more than one shard. Raises ModelError when a source is damaged.
    """
    plans = []
    for source in sources:
        content, begin = header(source)
        metadata = content.pop("__metadata__", {"format": "pt"})
        rows = [(new, content[old]) for old in content if (new := rename(old)) is not None]
        if rows:
            plans.append((source, begin, metadata, sorted(rows, key=lambda row: row[1]["data_offsets"][0])))
    total, where = 0, {}
    for number, (source, begin, metadata, rows) in enumerate(plans, 1):
        name = "model.safetensors" if len(plans) == 1 else f"model-{number:05}-of-{len(plans):05}.safetensors"
        offset = 0
        new_header: dict[str, Any] = {"__metadata__": metadata}
        for new, row in rows:
            length = row["data_offsets"][1] - row["data_offsets"][0]
            new_header[new] = {"dtype": row["dtype"], "shape": row["shape"], "data_offsets": [offset, offset + length]}
            where[new] = name
            offset += length
        encoded = json.dumps(new_header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
        with source.open("rb") as read, (out / name).open("wb") as write:
            write.write(struct.pack("<Q", len(encoded)) + encoded)
            for _, row in rows:
                read.seek(begin + row["data_offsets"][0])
                left = row["data_offsets"][1] - row["data_offsets"][0]
                while left:
                    piece = read.read(min(left, _PIECE))
                    if not piece:
                        raise ModelError(f"{source} grew shorter while it was read; leave it alone and start again")
                    write.write(piece)
                    left -= len(piece)
        total += offset
    if len(plans) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    return total


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype, shape and place of every tensor, from the headers alone. Raises ModelError for a damaged file."""
    return {name: row for shard in shards(folder) for name, row in header(shard)[0].items() if name != "__metadata__"}


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint. Raises ModelError for a damaged file."""
    return {name: tuple(row["shape"]) for name, row in rows_of(folder).items()}


def shards(folder: Path) -> list[Path]:
    """The safetensors files with float weights."""
    found = sorted(p for p in folder.glob("*.safetensors") if p.name != PACKED)
    indexed = sorted(folder.glob("model*.safetensors"))
    return indexed or found
