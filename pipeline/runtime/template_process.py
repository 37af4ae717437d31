"""The process that renders a chat template, from the side that asks it; what it does is in template_child.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from edgepress.pipeline.search_path import child_environment

CHILD = Path(__file__).with_name("template_child.py")
SECONDS = 15.0  # on the clock, for one request; the child itself gives up earlier, after so much time on a processor


class TemplateError(Exception):
    """The template failed; the text says why."""


class TemplateProcess:
    """A compiled template in a process that lives as long as this object, and is started again when a request was its end."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError for a source that does not compile."""
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._ready()

    def render(self, values: dict[str, object]) -> str:
        """The text for these values. Raises TemplateError."""
        return self._ask(self._ready(), {"values": values})

    def _ready(self) -> subprocess.Popen[bytes]:
        """The process, with the template compiled."""
        if self._process is None:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, str(CHILD)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=child_environment()
            )
            weakref.finalize(self, _end, process)
            self._process = process
            self._ask(process, {"source": self._source})
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, object]) -> str:
        assert process.stdin is not None and process.stdout is not None
        clock = threading.Timer(SECONDS, process.kill)
        clock.daemon = True
        clock.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:  # it ended before it had read all
            line = b""
        except BaseException:  # Ctrl-C: the answer to come would be taken for that to the next request
            self._drop(process)
            raise
        finally:
            clock.cancel()
        if not line.endswith(b"\n"):
            self._drop(process)
            raise TemplateError("it does not end, or takes more memory than a template may")
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def _drop(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what it did not read is lost
                pipe.close()
