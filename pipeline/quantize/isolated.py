"""Calls a function in a process of its own, and logs, shows and raises here what it logs, reports and raises there.

For work that changes environment variables, patches libraries or prints a great deal: that, and its memory, stays away from
the stages that follow. The process that waits imports nothing of the work.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edgepress.pipeline.errors import EdgepressError, ProofError
from edgepress.pipeline.files import remove
from edgepress.pipeline.lock import descriptors
from edgepress.pipeline.progress import Bar, Mirror, bar, show_elsewhere
from edgepress.pipeline.registry import load
from edgepress.pipeline.search_path import child_environment

log = logging.getLogger("edgepress")
PARENT = "EDGEPRESS_PARENT"
CHILD = "import sys; from edgepress.pipeline.quantize.isolated import child; child(sys.argv[1])"
# In the folder that both processes know: the pickled call, all output, the child's messages (JSON lines), and its answer, a
# pickled result or exception.
CALL, OUTPUT, MESSAGES, ANSWER = "call.pickle", "output.log", "messages.jsonl", "answer.pickle"


@dataclass(frozen=True)
class Begun:
    """The long part of the work has begun: so many matrices.

    checkpoint: the file below the scratch folder with which it can be resumed once that file exists. lost_because: why it
    cannot be resumed at all, "" where it can.
    """

    matrices: int
    checkpoint: str
    lost_because: str = ""


def run_isolated(function: str, arguments: tuple[object, ...], label: str, scratch: Path) -> object:
    """Call ``function``, "module:name", with ``arguments`` in a process of its own; returns what it returns.

    label: of the work in messages and on the progress bar. scratch: the folder in which the work leaves what it can resume
    from; removed when the call succeeds. Raises what the function raises, and ProofError with the last line of its output
    when the process ends without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-") as shared:
        (Path(shared) / CALL).write_bytes(pickle.dumps((function, arguments)))
        (Path(shared) / MESSAGES).touch()
        result = _follow(Path(shared), label, scratch)
    remove(scratch)
    return result


def _follow(shared: Path, label: str, scratch: Path) -> object:
    """Start the child, and pass its messages on until it ends."""
    environment = child_environment() | {PARENT: str(os.getpid())}
    command = [sys.executable, "-c", CHILD, str(shared)]
    with (
        (shared / OUTPUT).open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment, pass_fds=descriptors()) as process,
        _Listener(shared, label) as listener,
    ):
        try:
            while process.poll() is None:
                listener.receive()
                time.sleep(0.2)
            return listener.answer(process.returncode)
        except BaseException as error:
            process.kill()
            process.wait()
            listener.receive()
            if listener.begun is not None:
                # a proof that failed would fail again
                resumable = not (isinstance(error, ProofError) and (shared / ANSWER).is_file())
                leave(scratch, label, listener.begun, resumable)
            raise


def leave(scratch: Path, label: str, begun: Begun, resumable: bool) -> None:
    """Keep what the work can be resumed from, remove the rest, and log which."""
    if resumable and (scratch / begun.checkpoint).is_file():
        log.info("quantize: the progress of %s so far is kept in %s; the same command resumes it", label, scratch)
        return
    remove(scratch)
    if resumable:
        log.info("quantize: the progress of %s so far is lost%s", label, begun.lost_because)


class _Listener:
    """Receives the messages of a child and its answer. begun: None until the long part of the work begins."""

    def __init__(self, shared: Path, label: str) -> None:
        self._messages, self._rest = (shared / MESSAGES).open("rb"), b""
        self._shared, self._label = shared, label
        self.begun: Begun | None = None
        self._bar: Bar | None = None
        self._inner = Mirror()

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()
        if self._bar is not None:
            self._bar.close()
        self._messages.close()

    def receive(self) -> None:
        """Act on the messages that are new."""
        *lines, self._rest = (self._rest + self._messages.read()).split(b"\n")
        for message in map(json.loads, lines):
            if "log" in message:
                log.info("%s", message["log"])
            if "begun" in message:
                self.begun = Begun(**message["begun"])
                self._bar = bar(self._label, self.begun.matrices, "matrix")
            if self._bar is not None:
                if "step" in message:
                    self._bar.set_description(f"  {self._label}, {message['step']}", refresh=False)
                self._bar.update(message.get("finished", 0))
            elif "bar" in message:  # of work that has no long part of its own
                self._inner.show(tuple(message["bar"]))

    def answer(self, code: int) -> object:
        """The result of a child that ended. Raises its error, or ProofError when it left none."""
        self.receive()
        if not (self._shared / ANSWER).is_file():
            lines = [line.strip() for line in (self._shared / OUTPUT).read_text(errors="replace").splitlines() if line.strip()]
            raise ProofError(f"{self._label} failed with exit code {code}: {lines[-1] if lines else 'no output'}")
        answer: object = pickle.loads((self._shared / ANSWER).read_bytes())
        if isinstance(answer, BaseException):
            raise answer
        return answer


# --- in the child

_shared: Path | None = None


def report_begun(begun: Begun) -> None:
    """Tell the waiting process, if there is one, that the long part of the work begins."""
    _send(begun=asdict(begun))


def report_progress(finished: int, step: str = "") -> None:
    """Report matrices finished since the last report, and what is being done."""
    _send(**{"finished": finished} | ({"step": step} if step else {}))


def _send(**message: object) -> None:
    if _shared is not None:
        with (_shared / MESSAGES).open("ab") as file:
            file.write(json.dumps(message).encode() + b"\n")


@contextmanager
def output_watched(receive: Callable[[str], None]) -> Iterator[None]:
    """Within the context, ``receive`` gets what this process prints, several times a second; nothing outside a child."""
    if _shared is None:
        yield
        return
    ended = threading.Event()
    with (_shared / OUTPUT).open("r", errors="replace") as output:

        def watch() -> None:
            while not ended.wait(0.2):
                if printed := output.read():
                    receive(printed)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _send(log=record.getMessage())


def child(shared: str) -> None:
    """Make the call that is pickled in a folder, and leave the result or the exception there."""
    global _shared
    _shared = Path(shared)
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent decides
    log.addHandler(_Relay())
    show_elsewhere(lambda shown: _send(bar=shown))
    log.setLevel(logging.INFO)
    function, arguments = pickle.loads((_shared / CALL).read_bytes())
    try:
        answer = load(function)(*arguments)
    except (EdgepressError, OSError, MemoryError) as error:
        answer = error
    part = _shared / f"{ANSWER}.part"
    part.write_bytes(pickle.dumps(answer))
    part.replace(_shared / ANSWER)


def _end_with_parent() -> None:
    """End this process soon after its parent: one that was killed outright cannot end it itself, and the work may take hours."""
    parent = int(os.environ.get(PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
