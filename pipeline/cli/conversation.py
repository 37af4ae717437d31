"""A conversation on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline import interrupt
from edgepress.pipeline.artifact import bench_folder, called
from edgepress.pipeline.cli.terminal import say
from edgepress.pipeline.errors import EdgepressError, InputError, OptionError, OutputError
from edgepress.pipeline.files import expanded
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import RunOptions
from edgepress.pipeline.registry import suggestion

if TYPE_CHECKING:
    from edgepress.pipeline.runtime.chat import Conversation

QUOTES = '"""'
HINT = 'Ctrl-C ends an answer, /bye or Ctrl-D quits, """ begins and ends a message of several lines, /help shows more'
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "lookup", "seed")


def chat(folder: Path, first: str | None, settings: RunOptions) -> int:
    """Read messages and stream answers until /bye or Ctrl-D; returns the exit code."""
    from edgepress.pipeline.runtime.chat import Conversation

    talk = Conversation(folder, settings)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then knows a history and edits lines
    for line in banner(folder, talk):
        say(line)
    given, piped = first, not sys.stdin.isatty()
    while True:
        try:
            line = _message() if given is None else given
            if line.rstrip() == "/bye":
                return 0
            if line.startswith("/"):
                command(talk, line)
            elif message := line.strip():
                _answer(talk, message)
                if piped:
                    print()  # one answer ends, and the next will begin
        except EOFError:
            return 0
        except (OptionError, InputError) as error:  # as of a template that refuses a message; the conversation is as it was
            if given is not None and isinstance(error, InputError):
                raise
            say(f"error: {error}")
        except BaseException:  # native code may swallow the KeyboardInterrupt and fail in its own way
            if signal.SIGINT not in interrupt.signals or len(set(interrupt.signals)) > 1:
                raise
            interrupt.forget()
            print()
            if given is None:
                say("/bye or Ctrl-D quits")
        given = None


def banner(folder: Path, talk: Conversation) -> Iterator[str]:
    """The model, its context and what it lost, where that was measured; then what can be typed."""
    lost = next(filter(None, map(_lost, (bench_folder(folder), *sorted(folder.resolve().parent.glob("*-bench"))))), "")
    yield f"{called(folder)}: a context of {talk.decoder.context:,} tokens, {talk.drawing}{lost}"
    yield HINT


def _lost(bench: Path) -> str:
    """``; perplexity 36.42 -> 36.58`` from a report, empty where there is none."""
    from edgepress.pipeline.report.model import read

    try:
        first, *_, last = read(bench / "report.json").first.perplexities.values()
    except (EdgepressError, ValueError):
        return ""
    return f"; perplexity {first:.4g} as it came, {last:.4g} pressed"


def _message() -> str:
    """A line, or all lines up to the closing quotes. Raises EOFError."""
    terminal = sys.stdin.isatty()
    line = input("> " if terminal else "")
    if not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        try:
            lines.append(input("... " if terminal else ""))
        except EOFError:  # whoever quits in a message sends what there is of it
            lines.append(QUOTES)
    return " " + "\n".join(lines).rstrip().removesuffix(QUOTES)  # what is quoted is no command


def command(talk: Conversation, line: str) -> None:
    """Obey a line that begins with a slash. Raises OptionError."""
    name, _, rest = line.strip().partition(" ")
    if name not in COMMANDS:
        nearest = suggestion(name, COMMANDS)
        raise OptionError(f"there is no {name}{nearest}; /help lists them, and a blank before it sends it as it is")
    try:
        COMMANDS[name][1](talk, rest.strip())
    except (InputError, OutputError) as error:  # of a file
        raise OptionError(str(error)) from error
    except OSError as error:
        raise OptionError(f"{rest.strip()}: {(error.strerror or str(error)).lower()}; give another file") from error


def _help(talk: Conversation, _: str) -> None:
    for name, (text, _action) in COMMANDS.items():
        say(f"{name:<8} {text}")
    say("/bye     quit, as Ctrl-D does")


def _new(talk: Conversation, _: str) -> None:
    talk.forget()
    say("a new conversation")


def _system(talk: Conversation, text: str) -> None:
    if not text:
        say(talk.options.system or "nothing but what the model's own template says; /system TEXT changes that")
        return
    talk.set(system=text)
    talk.forget()
    say("a new conversation, which begins with that")


def _set(talk: Conversation, text: str) -> None:
    name, _, value = text.replace("=", " ").partition(" ")
    if not name:
        for item in SETTINGS:
            chosen = talk.options.limit if item == "max_new_tokens" else getattr(talk.options, item)
            say(f"{item:<20} {'as the model has it' if chosen is None else chosen}")
        say(talk.drawing)
        return
    name = name.removeprefix("--").replace("-", "_")
    if name not in SETTINGS:
        raise OptionError(f"there is no setting '{name}'{suggestion(name, SETTINGS)}; there are: {', '.join(SETTINGS)}")
    given = dataclasses.asdict(talk.options) | {name: value.strip() or getattr(RunOptions, name)}  # the default
    talk.set(**{name: getattr(make(RunOptions, given), name)})
    chosen = getattr(talk.options, name)
    said = f"{name.replace('_', '-')} {'as the model has it' if chosen is None else chosen}"
    say(said if said == talk.drawing else f"{said}: {talk.drawing}")


def _save(talk: Conversation, text: str) -> None:
    file = expanded(text or "conversation.json")
    talk.save(file)
    say(f"{len(talk.messages)} messages saved in {file}")


def _load(talk: Conversation, text: str) -> None:
    file = expanded(text or "conversation.json")
    talk.load(file)
    say(f"{len(talk.messages)} messages loaded from {file}; the conversation goes on")


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], None]]] = {
    "/help": ("these lines", _help),
    "/new": ("a new conversation", _new),
    "/system": ("TEXT: what the model is told first, in a new conversation; alone shows it", _system),
    "/set": ("NAME VALUE, as temperature 0.8; without a value as the model has it; alone shows all", _set),
    "/save": ("FILE: keep the conversation (default: conversation.json)", _save),
    "/load": ("FILE: go on with one that was kept", _load),
}


def _answer(talk: Conversation, message: str) -> None:
    """Stream one answer and tell its speed: from its first piece on, as reading the message is another matter."""
    begun, count = time.monotonic(), 0
    with _quiet_keys(), contextlib.closing(talk.answer(message)) as pieces:
        for piece in pieces:
            if not count:
                begun = time.monotonic()
            print(piece, end="", flush=True)
            count += 1
    print()
    if talk.ended:
        say(talk.ended)
    if count > 1:
        rate = (count - 1) / (time.monotonic() - begun)
        say(f"{rate:.1f} tokens/s, {talk.read} tokens read, {talk.decoder.length} in the context")


@contextmanager
def _quiet_keys() -> Iterator[None]:
    """What is typed within the context does not show up in the answer; the next line to be read begins with it."""
    try:
        import termios

        keys = sys.stdin.fileno()
        former = termios.tcgetattr(keys)
    except (ImportError, ValueError, OSError, termios.error):  # no terminal, or not of this kind
        yield
        return
    silent = [*former[:3], former[3] & ~termios.ECHO, *former[4:]]
    termios.tcsetattr(keys, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSANOW, former)
