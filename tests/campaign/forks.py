"""Commands in forks of a process that has imported the libraries, stopped or killed before a chosen file-system step.

A campaign is ``run(seed, seconds) -> Outcome``; ``report`` prints its table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# Every step that may change what is on the disk, and which argument names it.
STEPS = {name: 0 for name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link")}
STEPS["shutil.copyfile"] = 1


@dataclass
class Outcome:
    """What was tried, by kind, and what went wrong, one line each."""

    tried: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """A folder of its own with a tiny model in it, and a text."""

    folder: Path
    model: Path
    text: Path


def prepared(folder: Path) -> Place:
    """Import what all commands need, once, and write a model of four tiny layers."""
    import matplotlib.pyplot  # noqa: F401
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    from edgepress.exporters import stage  # noqa: F401
    from edgepress.models import EVALUATION_TEXT, REFERENCE
    from edgepress.pipeline import cli, lock, recipe  # noqa: F401
    from edgepress.pipeline.prune import stage as prune  # noqa: F401
    from edgepress.pipeline.quantize import stage as quantize  # noqa: F401
    from families import TINY
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(0)
    lock.PATIENCE = 0.2  # whoever holds the lock here holds it until the other has given up
    model = folder / "model"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(model)
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(model)
    return Place(folder, model, EVALUATION_TEXT)


def start(argv: list[object], root: Path, *, at: int = 0, sent: int = signal.SIGKILL, steps: Path | None = None) -> int:
    """The process of a command. ``sent`` goes to it before its step ``at`` below ``root``; all steps are listed in ``steps``.

    What it says goes to ``root.err``, and later commands' is added to it.
    """
    if process := os.fork():
        return process
    os.setsid()
    said = os.open(root.with_name(f"{root.name}.err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    for old, new in ((nothing, 0), (nothing, 1), (said, 2)):
        os.dup2(old, new)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    _watch(root, at, sent, steps)
    code: object = 1
    try:
        from edgepress.pipeline import cli

        code = cli.main([str(part) for part in argv])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    os._exit(int(code or 0) if isinstance(code, int | None) else 1)


def _watch(root: Path, at: int, sent: int, steps: Path | None) -> None:
    log = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if steps else None
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in STEPS:
            return
        path = arguments[STEPS.get(event, 0)]
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(str(root)):
            return
        count += 1
        if log is not None:
            os.write(log, f"{count} {event} {os.fsdecode(path)}\n".encode())
        if count == at:
            os.kill(os.getpid(), sent)

    sys.addaudithook(hook)


def ended(process: int, *, or_stopped: bool = False, seconds: float = 120) -> int | str:
    """Exit code of a process, "stopped", or "hangs"."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG | (os.WUNTRACED if or_stopped else 0))
        if found:
            return "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "hangs"


def said(root: Path) -> str:
    """All that the commands of a trial wrote to stderr."""
    file = root.with_name(f"{root.name}.err")
    return file.read_text(errors="replace") if file.is_file() else ""


def last_line(root: Path) -> str:
    return (said(root).strip().splitlines() or [""])[-1][:200]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(folder: Path) -> dict[str, str]:
    """Digest of every file below but for what took how long: manifests, build.json, and lines of seconds in JSON."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ("manifest.json", "build.json"))
    return {str(file.relative_to(folder)): untimed(file) for file in files}


def untimed(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".json":
        content = b"".join(line for line in content.splitlines(keepends=True) if b"seconds" not in line)
    return hashlib.sha256(content).hexdigest()


def broken(folder: Path) -> list[str]:
    """What in a finished folder, or in the stages of a build, is not what its manifest says."""
    stages = [folder] if (folder / "manifest.json").exists() else sorted(folder.glob("**/[0-9][0-9]-*"))
    faults = []
    for stage in stages:
        try:
            files = json.loads((stage / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            faults.append(f"{stage.name} has no manifest ({error})")
            continue
        there = {str(f.relative_to(stage)) for f in stage.rglob("*") if f.is_file()} - {"manifest.json"}
        if there != set(files):
            faults.append(f"{stage.name} has {sorted(there ^ set(files))[:3]} more or less than its manifest")
        faults += [f"{stage.name}/{n} differs" for n in there & set(files) if digest(stage / n) != files[n]["sha256"]]
    return faults


def hidden(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob(".*"))


def report(run: Callable[[int, float], Outcome], description: str) -> int:
    """The command line of a campaign: its table, and exit code 1 when anything went wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    outcome = run(given.seed, given.seconds)
    for kind, number in sorted(outcome.tried.items()):
        print(f"{number:>6}  {kind}")
    print(f"{sum(outcome.tried.values()):>6}  tried, {len(outcome.faults)} faults")
    print("\n".join(outcome.faults))
    return bool(outcome.faults)


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgepress-campaign-")
