"""Bad inputs, each given to the command line in a fork of a process that has imported everything: a refusal must be one line.

PYTHONPATH=tests python -m campaign.inputs --seed 1 --seconds 60 [--count N] [--kinds config.json,graph] [--only KIND:N]

Input N of a kind is made from "SEED/KIND/N" alone, so --only makes it again and shows what the command says.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LIMIT = 20  # seconds of a processor that a command may take: other programs may slow the clock on the wall
ASLEEP = 120  # seconds on the wall, for a command that waits for nothing
MEMORY = 4 << 30  # bytes beyond those of the process that is forked, which has all libraries in memory
COLUMNS = ("inputs", "refused", "accepted", "traceback", "hang", "signal", "no error line", "left behind")
FAULTS = COLUMNS[3:]


@dataclass
class Tally:
    """What became of the inputs of each kind, and of every fault a line that says how to make it again."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, result: str, told: str) -> None:
        """Count an input. told: where it comes from and what was said."""
        counts = self.counts.setdefault(kind, Counter())
        counts["inputs"] += 1
        counts[result] += 1
        if result in FAULTS:
            self.faults.append(f"{result}: {told}")
            print(self.faults[-1], file=sys.stderr, flush=True)  # at once, for a campaign may be stopped

    def table(self) -> str:
        """A line a kind, and their sum."""
        total: Counter[str] = sum(self.counts.values(), Counter())
        rows = [("kind", *COLUMNS)]
        rows += [(kind, *(str(counts[name]) for name in COLUMNS)) for kind, counts in [*self.counts.items(), ("all", total)]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def run(seed: int, seconds: float, kinds: list[str] | None = None, count: int | None = None, begin: int = 0) -> Tally:
    """Inputs of every kind in turn until the time, or ``count`` of each, is over."""
    from campaign.more_cases import KINDS

    tally, chosen = Tally(), kinds or list(KINDS)
    with whole_folders() as root:
        begun, number = time.monotonic(), begin
        while time.monotonic() - begun < seconds and (count is None or number < begin + count):
            for kind in chosen:
                result, said = tried(root, kind, number, seed)
                tally.add(
                    kind, result, f"--seed {seed} --only '{kind}:{number}': {said.strip().splitlines()[-1][:200] if said else ''}"
                )
            number += 1
    return tally


@contextmanager
def whole_folders() -> Iterator[Path]:
    """A scratch folder with ``bases``, whole folders of every format; what all commands need is imported."""
    import importlib
    import pkgutil

    import edgepress.exporters
    import edgepress.pipeline
    import matplotlib.pyplot  # noqa: F401
    import onnx.checker
    import onnx.defs  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    from campaign import bases

    torch.set_num_threads(1)
    for package in (edgepress.pipeline, edgepress.exporters):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", ".worker", ".tasks", ".bnb", ".gptq", ".lora", ".isolated")):
                importlib.import_module(module.name)
    with tempfile.TemporaryDirectory(prefix="edgepress-campaign-") as folder:
        bases.make(Path(folder) / "bases")
        yield Path(folder)


def tried(root: Path, kind: str, number: int, seed: int) -> tuple[str, str]:
    """Which column an input belongs to, and what the command said on stderr."""
    from campaign.more_cases import KINDS

    place = root / "case"
    shutil.rmtree(place, ignore_errors=True)
    (place / "cwd").mkdir(parents=True)
    argv = KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), root / "bases", place)
    if any("\0" in word for word in argv):  # no command line can hold one
        argv = [word.replace("\0", "") for word in argv]
    code = _ended(_started(argv, place))
    said = (place / "err").read_text(errors="replace")
    return _column(code, said, place), said


def _column(code: int | None, said: str, place: Path) -> str:
    if code is None:
        return "hang"
    if code < 0:
        return "signal"
    if "Traceback" in said or code not in (0, 2):
        return "traceback"
    if code == 0:
        return "accepted"
    if not said.rstrip("\n").rpartition("\n")[2].startswith("error: "):
        return "no error line"
    return "left behind" if (place / "out").exists() or any(place.glob(".*")) else "refused"


def _started(argv: list[str], place: Path) -> int:
    """The process of a command line: a fork of this one with streams, folder and limits of its own."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.setsid()
        files = [
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(place / name, os.O_WRONLY | os.O_CREAT) for name in ("out-text", "err")),
        ]
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2))
        os.chdir(place / "cwd")
        used = int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from edgepress.pipeline.cli import main

        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _ended(process: int) -> int | None:
    """Exit code of a process, negative for a signal, None when it had to be ended."""
    begun = time.monotonic()
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if _worked(process) > LIMIT or time.monotonic() - begun > ASLEEP:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.003)


def _worked(process: int) -> float:
    """Seconds of a processor that a process has taken, as Linux counts them."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--count", type=int, help="inputs of each kind, at most")
    parser.add_argument("--begin", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", help="some of them, separated by commas")
    parser.add_argument("--only", metavar="KIND:N", help="one input, and what the command says")
    options = parser.parse_args()
    if options.only:
        kind, _, number = options.only.rpartition(":")
        with whole_folders() as root:
            result, said = tried(root, kind, int(number), options.seed)
        print(f"{result}\n{said}")
        return 0
    kinds = options.kinds.split(",") if options.kinds else None
    tally = run(options.seed, options.seconds, kinds, options.count, options.begin)
    print("\n".join([*tally.faults, tally.table()]))
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
