"""Ctrl-C and SIGTERM: what runs is interrupted, and the command ends with one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of the signals that arrived and were not dealt with.
signals: list[int] = []
_timer: threading.Timer | None = None
_former = sys.__unraisablehook__  # of whoever called from Python
_holding = False


def install_handlers() -> None:
    """A polite kill cleans up as Ctrl-C does; a signal that the shell ignores stays ignored. ``finish`` ends it."""
    global _former
    forget()
    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)
    if sys.unraisablehook is not lost:
        _former, sys.unraisablehook = sys.unraisablehook, lost


def stop(number: int, frame: object) -> None:
    """Handle a signal: note it, and interrupt what runs."""
    signals.append(number)
    if not _holding:
        raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes within the context interrupts at its end: what is begun there is also noted there."""
    global _holding
    if _holding or threading.current_thread() is not threading.main_thread():  # where signals interrupt
        yield
        return
    before, _holding = len(signals), True
    try:
        yield
    finally:
        _holding = False
    if len(signals) > before:
        raise KeyboardInterrupt


def lost(what: sys.UnraisableHookArgs) -> None:
    """Interrupt once more, in a moment: what Python calls from C, as a finalizer, cannot pass a KeyboardInterrupt on."""
    global _timer
    if not signals or not issubclass(what.exc_type, KeyboardInterrupt):
        _former(what)
        return
    settled()
    _timer = threading.Timer(0.05, _again)
    _timer.daemon = True
    _timer.start()


def _again() -> None:
    for number in signals[-1:]:
        if hasattr(signal, "pthread_kill"):  # wakes the main thread from a system call
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        else:
            signal.raise_signal(number)


def check() -> None:
    """Raise the KeyboardInterrupt that was asked for and that native code has swallowed."""
    if signals:
        settled()
        raise KeyboardInterrupt


def settled() -> None:
    """What was asked for is being done: it does not come again while things are cleaned up."""
    if _timer is not None:
        _timer.cancel()


def forget() -> None:
    """Go on as if no signal had come."""
    settled()
    signals.clear()


def finish() -> None:
    """The end of a command: whoever called from Python goes on, with the hook that was there."""
    forget()
    if sys.unraisablehook is lost:
        sys.unraisablehook = _former


def message(writes: bool, resumes: bool) -> str:
    """The line for an interrupted command: one that writes a folder, one that resumes when it is run again."""
    more = "; nothing half-written is left" if writes else ""
    return f"interrupted{more}" + ("; run the same command to resume after the last finished stage" if resumes else "")
