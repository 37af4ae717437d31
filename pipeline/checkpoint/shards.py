"""Safetensors files: which of them hold a checkpoint's weights, where each tensor lies, and copies without loading."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline.documents import MAX_BYTES, DocumentError, parse_object, typed
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, check_file, check_pointer, read_json, write_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
PACKED = "packed.safetensors"  # our own quantized matrices, next to the float weights
_PIECE = 16 << 20
_FIRST = 1024  # numbers that are looked at before all are
_NUMBERS = 2**22  # numbers that are looked at together
_Copies = list[tuple[str, "TensorEntry"]]  # new name, what it is copied from


@dataclass(frozen=True)
class _Index:
    """weight_map: tensor -> file."""

    weight_map: dict[str, str]


def shards(folder: Path) -> list[Path]:
    """The safetensors files with float weights: those that the index names; without an index, model.safetensors.

    What else lies in the folder (a shard of another save, a backup) is not the checkpoint's, as transformers has it too; but a
    lone file of AutoGPTQ is. Empty where there are none. Raises ModelError for a damaged index, a file that it names and that
    is not there, and a folder where nothing says which files count.
    """
    if (folder / INDEX).is_file():
        try:
            places = typed(_Index, read_json(folder / INDEX), "index").weight_map
        except DocumentError as error:
            raise ModelError(f"{folder / INDEX} has no weight_map of file names ({error}); correct it or replace it") from error
        files = [folder / name for name in sorted(set(places.values()))]
        if missing := next((file for file in files if not file.exists() or file.parent != folder), None):
            raise ModelError(f"{folder / INDEX} names {missing.name}, which is not there; give the complete checkpoint")
        for file in files:
            check_file(file)
        if (single := folder / "model.safetensors").is_file() and single not in files:
            raise ModelError(f"{folder} holds both {single.name} and the shards of {INDEX}; move away what is not the model's")
        return files
    if (single := folder / "model.safetensors").exists():
        check_file(single)
        return [single]
    others = sorted(p for p in folder.glob("*.safetensors") if p.name != PACKED)
    if not others or (len(others) == 1 and (folder / "quantize_config.json").is_file()):
        return others
    raise ModelError(
        f"{folder} has neither model.safetensors nor {INDEX}, so nothing says whether {others[0].name} is the model's; give the "
        "complete checkpoint"
    )


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, its type as safetensors calls it, and its bytes, ``begin`` to ``end`` of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin


@dataclass(frozen=True)
class _Row:
    """What a header says of a tensor; data_offsets: of its first byte and behind its last, in the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if min((0, *self.shape, *self.data_offsets)) < 0 or max((0, *self.shape, *self.data_offsets)) >> 63:
            raise ValueError("a size or offset out of range")


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file. begin: where the data begins, in bytes."""

    file: Path
    begin: int
    metadata: dict[str, str] | None
    entries: dict[str, TensorEntry]


def read_header(file: Path) -> Header:
    """The header of a safetensors file, checked. Raises ModelError when the file is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    check_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        begin = 8 + length
        try:
            if begin > size:
                raise ValueError("header beyond the end")
            content = parse_object(stream.read(min(length, MAX_BYTES + 1)))
            metadata = content.pop("__metadata__", None)
            metadata = None if metadata is None else typed(dict[str, str], metadata, "__metadata__")
            rows = typed(dict[str, _Row], content, "tensors")
            entries = {
                name: TensorEntry(file, row.dtype, row.shape, *(begin + offset for offset in row.data_offsets))
                for name, row in rows.items()
            }
        except ValueError as error:
            raise ModelError(f"{file} is damaged or cut short, no safetensors file ({error}); replace it") from error
    end = max((entry.end for entry in entries.values()), default=begin)
    if end != size:
        what = "is cut short" if size < end else "has more behind its end, as when two files were joined"
        raise ModelError(f"{file} {what}: {size} bytes, its header promises {end}; replace it")
    try:
        with safe_open(file, "np"):  # it checks types, shapes and offsets against each other
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or cut short ({error}); replace it") from error
    return Header(file, begin, metadata, entries)


class ShardIndex:
    """Safetensors files and where each of their tensors lies, from the headers. Raises ModelError when a file is damaged.

    Tensors are read, not mapped: of a mapped file, what was read once counts as memory until its last tensor is freed.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.headers = tuple(map(read_header, files))
        self._entries = {name: entry for header in self.headers for name, entry in header.entries.items()}

    @classmethod
    def of(cls, folder: Path) -> ShardIndex:
        """The files with a checkpoint's float weights."""
        return cls(shards(folder))

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return [header.file for header in self.headers]

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ModelError(f"the checkpoint lacks {name}; give the complete checkpoint")
        return self._entries[name]

    def read(self, name: str) -> bytearray:
        """The bytes of a tensor. Raises ModelError when it is missing."""
        return _read(self[name])

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its stored type. Raises ModelError when it is missing or of a type that torch lacks."""
        return _tensor(name, self[name])

    def is_zero(self, name: str) -> bool:
        """Whether every number of a tensor is zero; of one that is not, little is read. Raises ModelError when it is missing."""
        entry, count = self[name], min(math.prod(self[name].shape), _FIRST)
        first = replace(entry, shape=(count,), end=entry.begin + count * entry.nbytes // max(1, math.prod(entry.shape)))
        return not _tensor(name, first).any() and not self.tensor(name).any()

    def tensors(self, names: Container[str], finite: Container[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors ``names`` in their stored types, file by file. Raises ModelError for NaN and Inf in those of ``finite``."""
        import torch

        for header in self.headers:
            for name in filter(names.__contains__, sorted(header.entries)):
                tensor = _tensor(name, header.entries[name])
                floating = name in finite and tensor.is_floating_point()
                # some at a time: a sum in float64 makes a copy in float64 first, eight times the bytes of a large embedding
                pieces = tensor.flatten().split(_NUMBERS) if floating else ()
                if not all(torch.isfinite(piece.float().sum(dtype=torch.float64)) for piece in pieces):
                    raise ModelError(f"{name} in {header.file} holds NaN or Inf; the checkpoint is broken there; give another one")
                yield name, tensor

    def rewrite(self, out: Path, rename: Callable[[str], str | None]) -> int:
        """Copy every tensor that ``rename`` gives a name to into ``out``, one new file for each; returns the bytes copied.

        Writes an index when there is more than one file. Tensors keep their dtype and bytes and are never loaded.
        """
        plans: list[tuple[Header, _Copies]] = []
        for header in self.headers:
            copies = [(new, entry) for old, entry in header.entries.items() if (new := rename(old)) is not None]
            if copies:
                plans.append((header, sorted(copies, key=lambda copy: copy[1].begin)))
        weight_map: dict[str, str] = {}
        for number, (header, copies) in enumerate(plans, 1):
            name = "model.safetensors" if len(plans) == 1 else f"model-{number:05}-of-{len(plans):05}.safetensors"
            _copy(header, copies, out / name)
            weight_map |= {new: name for new, _ in copies}
        total = sum(entry.nbytes for _, copies in plans for _, entry in copies)
        if len(plans) > 1:
            write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        return total


def _read(entry: TensorEntry) -> bytearray:
    content = bytearray(entry.nbytes)
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        if stream.readinto(content) != len(content):
            raise ModelError(f"{entry.file} is cut short; replace it")
    return content


def _tensor(name: str, entry: TensorEntry) -> torch.Tensor:
    from edgepress.pipeline.checkpoint.dtypes import to_torch

    return to_torch(name, _read(entry), entry.dtype, entry.shape)


def _copy(source: Header, copies: _Copies, target: Path) -> None:
    """Write a safetensors file of the entries, in the order given, piece by piece."""
    rows: JsonObject = {"__metadata__": {"format": "pt"} if source.metadata is None else source.metadata}
    offset = 0
    for new, entry in copies:
        rows[new] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    encoded = json.dumps(rows, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
    with source.file.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, entry in copies:
            read.seek(entry.begin)
            left = entry.nbytes
            while left:
                piece = read.read(min(left, _PIECE))
                if not piece:
                    raise ModelError(f"{source.file} grew shorter while it was read; leave it alone and start again")
                write.write(piece)
                left -= len(piece)


def rewrite(files: list[Path], out: Path, rename: Callable[[str], str | None]) -> int:
    """``ShardIndex.rewrite`` of some files."""
    return ShardIndex(files).rewrite(out, rename)


def rows_of(folder: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor of a checkpoint. Raises ModelError for a damaged file."""
    index = ShardIndex.of(folder)
    return {name: index[name] for name in index}
