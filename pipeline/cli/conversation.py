"""A conversation on the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline import interrupt
from edgepress.pipeline.cli.terminal import say
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import RunOptions

if TYPE_CHECKING:
    from edgepress.pipeline.runtime.chat import Conversation


def chat(folder: Path, first: str | None, settings: RunOptions) -> int:
    """Read messages and stream answers until /bye or Ctrl-D; returns the exit code."""
    from edgepress.pipeline.runtime.chat import Conversation

    talk = Conversation(folder, settings)
    message = first
    say("Ctrl-C ends an answer, /new starts over, /bye or Ctrl-D quits")
    while True:
        try:
            if message is None:
                message = input("> " if sys.stdin.isatty() else "").strip()
            if message == "/bye":
                return 0
            if message == "/new":
                talk.forget()
            elif message:
                _answer(talk, message)
        except EOFError:
            return 0
        except OptionError as error:
            say(f"error: {error}")
        except BaseException:  # native code may swallow the KeyboardInterrupt and fail in its own way
            if signal.SIGINT not in interrupt.signals or len(set(interrupt.signals)) > 1:
                raise
            interrupt.forget()
            print()
            if message is None:
                say("/bye or Ctrl-D quits")
        message = None


def _answer(talk: Conversation, message: str) -> None:
    """Stream one answer and tell its speed: from its first piece on, as reading the message is another matter."""
    begun, count = time.monotonic(), 0
    with contextlib.closing(talk.answer(message)) as pieces:
        for piece in pieces:
            if not count:
                begun = time.monotonic()
            print(piece, end="", flush=True)
            count += 1
    print()
    if count > 1:
        rate = (count - 1) / (time.monotonic() - begun)
        say(f"{rate:.1f} tokens/s, {talk.read} tokens read, {talk.decoder.length} in the context")
    if talk.full:
        say(f"the context of {talk.decoder.context} tokens is full, so the answer ends here; /new starts over")
