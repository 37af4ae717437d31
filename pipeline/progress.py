"""Progress of long work: a bar with time left on a terminal, nothing elsewhere (the log has a line per stage)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, NoReturn, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    Bar = tqdm[NoReturn]
else:
    Bar = tqdm

Item = TypeVar("Item")
# A bar elsewhere: its label, how much of how much is done, in which unit; nothing done of nothing where it ended.
Shown = tuple[str, float, float | None, str]
ENDED: Shown = ("", 0, None, "")

_pass_on: Callable[[Shown], None] | None = None


def progress(items: Iterable[Item], label: str, unit: str = "it") -> Iterator[Item]:
    """Iterate with a bar on stderr."""
    with bar(label, len(items) if isinstance(items, Sized) else None, unit) as shown:
        for item in items:
            yield item
            shown.update()


def bar(label: str, total: int | None, unit: str = "it") -> Bar:
    """A bar on stderr, for work that is not a simple loop."""
    if _pass_on is not None:
        return _Elsewhere(desc=label, total=total, unit=unit, file=io.StringIO(), leave=False, mininterval=0.5)
    return tqdm(desc=f"  {label}", total=total, unit=unit, leave=False, disable=None)


def show_elsewhere(receive: Callable[[Shown], None]) -> None:
    """From now on the bars of this process are told to ``receive``, which hands them to one that has a terminal."""
    global _pass_on
    _pass_on = receive


class Mirror:
    """A bar for what the bars of another process tell."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._shown: Shown = ENDED

    def show(self, shown: Shown) -> None:
        """Follow it; a bar of another label takes the place of the one before."""
        label, done, total, unit = shown
        if (label, total) != (self._shown[0], self._shown[2]):
            self.close()
            self._bar = bar(label, None if total is None else int(total), unit) if label else None
        self._shown = shown
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._shown = None, ENDED


class _Elsewhere(Bar):
    """A bar that is shown by another process."""

    def display(self, *_: object, **__: object) -> None:
        """As often as tqdm would draw it."""
        if _pass_on is not None:
            _pass_on((self.desc, self.n, self.total, self.unit))

    def close(self) -> None:
        """It is gone elsewhere, too."""
        open_before = not self.disable
        super().close()
        if open_before and _pass_on is not None:
            _pass_on(ENDED)
