"""Progress of long work: a bar with time left on a terminal, nothing elsewhere (the log has a line per stage)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, unit: str = "it") -> Iterator[Item]:
    """Iterate with a bar on stderr."""
    total = len(items) if isinstance(items, Sized) else None
    return iter(tqdm(items, desc=f"  {label}", total=total, unit=unit, leave=False, disable=None))
