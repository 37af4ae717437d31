"""What figures depend on besides the artifact: machine, versions, threads, date and command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from edgepress.pipeline.machine import cores
from edgepress.pipeline.registry import versions
from edgepress.pipeline.report.model import Cpu, Environment, Machine
from edgepress.pipeline.runtime.targets import TARGETS, gpus

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "torch", "transformers", "lm-eval")


def environment(target: str, threads: int) -> Environment:
    """The environment of a run, for its report."""
    return Environment(
        **vars(machine(target)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=_command(),
        threads=threads or "onnxruntime's default",
        provider=TARGETS[target].provider,
        # of the minute before: what else was running
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def _command() -> str:
    """As it was typed: the command line, or a script of ours."""
    program = Path(sys.argv[0])
    ours = program.name in ("edgepress", "cli.py") or program.suffix != ".py"
    return shlex.join([*(["edgepress"] if ours else ["python", str(program)]), *sys.argv[1:]])


def machine(target: str) -> Machine:
    """What of it a resumed measurement must find unchanged."""
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        cpu=_cpu(),
        cores=cores(),
        versions=versions(*_PACKAGES),
        gpus=tuple(gpus()) if target == "cuda" else None,
    )


def _cpu() -> Cpu:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return Cpu(platform.processor() or platform.machine())
    rows = dict(line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in rows.items()}
    every = (values.get("flags") or values.get("Features") or "").split()  # x86 and ARM
    vector = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "i8mm", "bf16")
    return Cpu(values.get("model name", platform.machine()), tuple(f for f in every if f.startswith(vector)))
