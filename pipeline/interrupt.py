"""Ctrl-C and SIGTERM: what runs is interrupted, and the command ends with one line."""

from __future__ import annotations

import signal
import sys
import threading
from typing import NoReturn

# Numbers of the signals that arrived since the handlers were installed.
signals: list[int] = []


def install_handlers() -> None:
    """A polite kill cleans up as Ctrl-C does; a signal that the shell ignores stays ignored."""
    signals.clear()
    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)
    sys.unraisablehook = lost


def stop(number: int, frame: object) -> NoReturn:
    """Handle a signal: note it, and interrupt what runs."""
    signals.append(number)
    raise KeyboardInterrupt


def lost(what: sys.UnraisableHookArgs) -> None:
    """Interrupt once more, in a moment: what Python calls from C, as a finalizer, cannot pass a KeyboardInterrupt on."""
    if not signals or not issubclass(what.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(what)
        return
    again = threading.Timer(0.05, _again)
    again.daemon = True
    again.start()


def _again() -> None:
    if signals and hasattr(signal, "pthread_kill"):  # wakes the main thread from a system call
        signal.pthread_kill(threading.main_thread().ident or 0, signals[-1])
    elif signals:
        signal.raise_signal(signals[-1])


def check() -> None:
    """Raise the KeyboardInterrupt that was asked for and that native code has swallowed."""
    if signals:
        raise KeyboardInterrupt


def message(writes: bool, resumes: bool) -> str:
    """The line for an interrupted command: one that writes a folder, one that resumes when it is run again."""
    more = "; nothing half-written is left" if writes else ""
    return f"interrupted{more}" + ("; run the same command to resume after the last finished stage" if resumes else "")
