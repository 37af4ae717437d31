"""Progress of long work: a bar with time left on a terminal, nothing elsewhere (the log has a line per stage)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import NoReturn, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, unit: str = "it") -> Iterator[Item]:
    """Iterate with a bar on stderr."""
    with bar(label, len(items) if isinstance(items, Sized) else None, unit) as shown:
        for item in items:
            yield item
            shown.update()


def bar(label: str, total: int | None, unit: str = "it") -> tqdm[NoReturn]:
    """A bar on stderr, for work that is not a simple loop."""
    return tqdm(desc=f"  {label}", total=total, unit=unit, leave=False, disable=None)
