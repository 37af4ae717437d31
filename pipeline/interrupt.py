"""Ctrl-C and SIGTERM: what runs is interrupted, and the command ends with one line."""

from __future__ import annotations

import signal
from typing import NoReturn

# Numbers of the signals that arrived since the handlers were installed.
signals: list[object] = []


def install_handlers() -> None:
    """A polite kill cleans up as Ctrl-C does; a signal that the shell ignores stays ignored."""
    signals.clear()
    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)


def stop(number: int, frame: object) -> NoReturn:
    """Handle a signal: note it, and interrupt what runs."""
    signals.append(number)
    raise KeyboardInterrupt


def check() -> None:
    """Raise the KeyboardInterrupt that was asked for and lost: what Python calls from C, as a finalizer, cannot raise it."""
    if signals:
        raise KeyboardInterrupt


def message(writes: bool, resumes: bool) -> str:
    """The line for an interrupted command: one that writes a folder, one that resumes when it is run again."""
    more = "; nothing half-written is left" if writes else ""
    return f"interrupted{more}" + ("; run the same command to resume after the last finished stage" if resumes else "")
