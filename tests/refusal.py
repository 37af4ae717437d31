"""What a refusal must look like: one line that says what is wrong and what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Refused = Callable[..., None]
Copy = Callable[..., Path]

# Every error tells what to do or what is allowed; these are the words it does so with.
ADVICE = re.compile(
    r"--help|needs --[a-z-]+, for example|"
    r"\b(give|choose|use|must|should|at most|there are|one of|is true or false|takes|convert|allow|free|fetch|build|delete"
    r"|upgrade|shorten|say how|make one|export (it|again)|leave|quantize (with|again)|pip install|install|check|correct"
    r"|mend|replace)\b"
)
LOG = re.compile(
    r"(trim|prune|narrow|healed|greedy|quantize|export|bench): |warning: the model cannot read "
)  # the last: random ones
COMMANDS = {
    "prune": ("prune", "SRC", "OUT", "--remove-count", "1", "--calibration-tokens", "64"),
    "quantize": ("quantize", "SRC", "OUT", "--method", "rtn"),
    "export": ("export", "SRC", "OUT"),
    "build": ("build", "SRC", "OUT", "--method", "rtn", "--remove-count", "1", "--calibration-tokens", "64"),
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, hidden ones too, with size and time of change (of files alone)."""
    found = {}
    for path in folder.rglob("*"):
        known = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (known.st_size, known.st_mtime_ns)
    return found


def check_refusal(code: int, err: str, says: tuple[str, ...]) -> None:
    *log, last = err.splitlines() or [""]
    assert code == 2 and "Traceback" not in err, err
    assert last.startswith("error: ") and all(LOG.match(line) for line in log), err
    for part in says:
        assert part in last, last
    if not ADVICE.search(last):
        pytest.fail(f"does not say what to do: {last}")


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        pytest.fail("hangs")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def command(verb: str, source: object, out: object) -> list[object]:
    return [{"SRC": source, "OUT": out}.get(part, part) for part in COMMANDS[verb]]


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncated_to(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)
