"""What the terminal gets, and nothing that steers it: on stderr the log, single lines, and one with an exit code for an error."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO, cast

from edgepress.pipeline.documents import short_line
from edgepress.pipeline.errors import EdgepressError, InputError
from edgepress.pipeline.registry import missing_package
from edgepress.pipeline.visible import one_line, plain_progress, plain_text


class _Plain:
    """A text stream that shows what is written to it, and lets none of it steer the terminal."""

    def __init__(self, stream: TextIO, plain: Callable[[str], str]) -> None:
        self._stream, self._plain = stream, plain

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._stream.write(self._plain(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Within the context nothing that is printed, by edgepress or by a library in Python, steers the terminal."""
    out, err = _Plain(sys.stdout, plain_text), _Plain(sys.stderr, plain_progress)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


_GPU = "CUDA out of memory"
# What torch and onnxruntime say where Python would raise a MemoryError.
_ALLOCATORS = ("can't allocate memory", "not enough memory", "Failed to allocate memory", "bad_alloc", _GPU)


def exit_code(error: BaseException) -> int:
    """One line and exit code 2 for what the user can mend; anything else is a bug, and raised again."""
    try:
        raise error
    except EdgepressError as error:
        reason = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _ALLOCATORS):
            raise
        reason = "out of memory; close other programs, press a smaller model, or let a stage or build take less: --memory 2GB"
        if _GPU in str(error):
            reason = "the GPU is out of memory; close other programs on it, or use the CPU: set CUDA_VISIBLE_DEVICES to nothing"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        reason = str(missing)
    except OSError as error:  # the disk, or a path: nothing that a traceback would explain
        reason = _disk_reason(error)
    say(f"error: {short_line(reason, most=4000)}")
    return 2


# What only writing can run into.
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def _disk_reason(error: OSError) -> str:
    """What went wrong with a file, and what to do about it."""
    name, reason = error.filename or "a file", error.strerror or str(error)
    if error.errno == errno.ENOENT and not (parent := Path(name).parent).is_dir():
        return f"no such folder: {parent}; make it, or give another"
    if error.errno == errno.ENAMETOOLONG:
        return f"{name}: {reason}; choose another output folder"
    if error.errno in _WRITING or (error.errno is None and "written" in reason):  # numpy counts the bytes, without an errno
        return f"cannot write {name}: {reason}; free some disk space or choose another output folder"
    return f"cannot use {name}: {reason}; check that it is there, that you may read and write it, and that the disk is sound"


def written(code: int) -> int:
    """The exit code, when all that was printed has arrived; 2 and a line where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)  # Python would try once more
            if isinstance(error, BrokenPipeError):
                continue
            with contextlib.suppress(OSError):
                say(f"error: cannot write the output: {error.strerror}; free some disk space")
                sys.stderr.flush()
            code = 2
    return code


def whole_streams() -> None:
    """Streams that the caller has closed lead nowhere: a model's file must not get the number that native code prints to."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def check_current_folder() -> None:
    """Raises InputError where it was deleted: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the current folder has been deleted; change to one that is there") from error


def speak_utf8() -> None:
    """UTF-8 for output, and for input that comes from a file, whatever the console's encoding: a model writes any character.

    What is no UTF-8, as a file name may be, is written with backslashes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # closed streams are None, and tests put their own in place
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        with contextlib.suppress(io.UnsupportedOperation):  # a caller in Python has read from it
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def log_to_terminal() -> None:
    """Send edgepress's log to stderr, plain, and keep other libraries' advice away."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(message)s"))
    log = logging.getLogger("edgepress")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    # Libraries that report at import, or at each graph, what a user can do nothing about.
    for name in ("torchao", "torch.utils._pytree", "torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def say(text: str) -> None:
    """A line on stderr."""
    print(one_line(text), file=sys.stderr)
