"""The quantize stage; with GPTQ, in a process of its own.

gptqmodel changes environment variables, patches libraries and talks a great deal: a process of its own keeps that, and its
memory, away from the stages that follow. The whole stage runs there, so that torch and transformers are loaded once, and the
process that waits, which needs neither, stays small.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import EdgepressError, ProofError
from edgepress.pipeline.files import remove
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.progress import bar
from edgepress.pipeline.registry import load, require

log = logging.getLogger("edgepress")
PARENT = "EDGEPRESS_PARENT"
CHILD = "import sys; from edgepress.pipeline.quantize.isolated import child; child(sys.argv[1])"
# In the folder that both processes know: arguments, what libraries print, what the child says (JSON lines), and its answer,
# facts or an exception.
ASKED, NOISE, SAID, ANSWER = "asked.pickle", "noise.log", "said.jsonl", "answer.pickle"


def quantize(source: Artifact, out: Path, options: QuantizeOptions) -> dict[str, Any]:
    """Run the stage, ``quantize.quantize``; what it raises and logs there is raised and logged here.

    Raises ProofError with its last words when the process ends without an answer. An interrupted GPTQ leaves what it needs to
    go on in ``scratch_of(out)`` where gptqmodel can resume, and the log says what is kept or lost.
    """
    if not METHODS[options.method].isolated:
        facts: dict[str, Any] = load("edgepress.pipeline.quantize.stage:quantize")(source, out, options)
        return facts
    for package in METHODS[options.method].packages:
        require(package)
    with tempfile.TemporaryDirectory(prefix="edgepress-") as shared:
        (Path(shared) / ASKED).write_bytes(pickle.dumps((source, out, options)))
        (Path(shared) / SAID).touch()
        facts = _followed(Path(shared), scratch_of(out))
    remove(scratch_of(out))
    return facts


def scratch_of(out: Path) -> Path:
    """The folder beside the output in which GPTQ works, ``.NAME.gptq``."""
    return out.with_name(out.name.removesuffix(".partial") + ".gptq")


def _followed(shared: Path, scratch: Path) -> dict[str, Any]:
    """Start the child, and pass on what it says until it ends."""
    # Without a worker count that fits the machine gptqmodel refuses to start on few cores.
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2)), PARENT: str(os.getpid())}
    with (
        (shared / NOISE).open("wb") as noise,
        subprocess.Popen([sys.executable, "-c", CHILD, shared], stdout=noise, stderr=noise, env=environment) as process,
        _Listener(shared) as listener,
    ):
        try:
            while process.poll() is None:
                listener.hear()
                time.sleep(0.2)
            return listener.answer(process.returncode)
        except BaseException as error:
            process.kill()
            process.wait()
            listener.hear()
            if listener.begun:
                # a proof that failed would fail again
                _leave(scratch, listener.begun, go_on=not (isinstance(error, ProofError) and (shared / ANSWER).is_file()))
            raise


def _leave(scratch: Path, begun: dict[str, Any], go_on: bool) -> None:
    """Keep what GPTQ can go on from, remove the rest, and say which."""
    if go_on and (scratch / "checkpoint" / "CURRENT").is_file():
        log.info("quantize: GPTQ of the layers done so far is kept in %s; the same command goes on there", scratch)
        return
    remove(scratch)
    if go_on:
        log.info("quantize: GPTQ of the layers done so far is lost%s", begun["lost_because"])


class _Listener:
    """Hears a child: its log lines, its answer, and what gptqmodel prints, a line for every matrix.

    begun: empty until GPTQ itself has begun.
    """

    def __init__(self, shared: Path) -> None:
        self._noise, self._said = (shared / NOISE).open("rb"), (shared / SAID).open("rb")
        self._shared, self._half = shared, b""
        self.begun: dict[str, Any] = {}
        self._shown = bar("gptq", None, "matrix")

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._shown, self._noise, self._said):
            opened.close()

    def hear(self) -> None:
        """Take in what is new."""
        *lines, self._half = (self._half + self._said.read()).split(b"\n")
        for what in map(json.loads, lines):
            if "log" in what:
                log.info("%s", what["log"])
            if "begun" in what:
                self.begun, self._shown.total = what["begun"], what["begun"]["matrices"]
        printed = self._noise.read()
        if layers := re.findall(rb"Quantizing layer (\d+) of (\d+)", printed):
            self._shown.set_description(f"  gptq, layer {int(layers[-1][0])} of {int(layers[-1][1])}", refresh=False)
        self._shown.update(printed.count(b"'process': 'gptq'"))

    def answer(self, code: int) -> dict[str, Any]:
        """The facts of a child that ended. Raises its error, or ProofError when it left none."""
        self.hear()
        if not (self._shared / ANSWER).is_file():
            self._noise.seek(0)
            lines = [line.strip() for line in self._noise.read().decode(errors="replace").splitlines() if line.strip()]
            raise ProofError(f"gptqmodel failed with exit code {code}: {lines[-1] if lines else 'no output'}")
        answer = pickle.loads((self._shared / ANSWER).read_bytes())
        if isinstance(answer, BaseException):
            raise answer
        facts: dict[str, Any] = answer
        return facts


# --- in the child

_shared: Path | None = None


def tell(**what: Any) -> None:
    """Say something to the process that waits, if there is one."""
    if _shared is not None:
        with (_shared / SAID).open("ab") as file:
            file.write(json.dumps(what).encode() + b"\n")


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(log=record.getMessage())


def child(shared: str) -> None:
    """Run the stage that is asked for in a folder, and say there what came of it."""
    global _shared
    _shared = Path(shared)
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent decides
    log.addHandler(_Relay())
    log.setLevel(logging.INFO)
    try:
        answer = load("edgepress.pipeline.quantize.stage:quantize")(*pickle.loads((_shared / ASKED).read_bytes()))
    except (EdgepressError, OSError, MemoryError) as error:
        answer = error
    part = _shared / f"{ANSWER}.part"
    part.write_bytes(pickle.dumps(answer))
    part.replace(_shared / ANSWER)


def _end_with_parent() -> None:
    """End this process soon after its parent: one that was killed outright cannot end it itself, and GPTQ runs for hours."""
    parent = int(os.environ.get(PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
