"""What an artifact runs on: one row per target, and the one place that chooses onnxruntime's execution provider."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepress.pipeline.errors import InputError, MissingPackageError, OptionError
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.registry import look_up, require

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Target:
    """One row. provider: onnxruntime's name for it. device: where the key-value cache is, as OrtValue names it."""

    provider: str
    device: str


TARGETS = {
    "cpu": Target("CPUExecutionProvider", "cpu"),
    "cuda": Target("CUDAExecutionProvider", "cuda"),
    "web": Target("CPUExecutionProvider", "cpu"),  # of which a browser has another build
}


def target(name: str) -> Target:
    """The row of a target. Raises MissingPackageError or InputError that names what this machine lacks for it."""
    row = look_up(TARGETS, name, "target")
    if name == "cuda":
        providers: list[str] = []
        with suppress(MissingPackageError):  # its message names the extra for the CPU
            require("onnxruntime")
            import onnxruntime

            providers = onnxruntime.get_available_providers()
        if row.provider not in providers:
            raise MissingPackageError(
                "onnxruntime-gpu is not installed (the installed onnxruntime, if any, has no CUDA); "
                "in an environment without onnxruntime: pip install '.[cuda]'"
            )
        if not gpus():
            raise InputError("no NVIDIA GPU is visible (nvidia-smi lists none); use a machine that has one, or --target cpu")
    return row


def check_threads(count: int) -> None:
    """Raise OptionError for more threads than this machine has processors; 0 leaves the choice to onnxruntime."""
    if count > (os.cpu_count() or count):
        raise OptionError(f"{count} threads are more than the {os.cpu_count()} processors of this machine; give at most as many")


def session(model: str, options: onnxruntime.SessionOptions, name: str = "cpu") -> onnxruntime.InferenceSession:
    """A session on a target. Raises InputError when onnxruntime silently fell back to another provider."""
    import onnxruntime

    row = target(name)
    if name == "cuda":
        with redirect_stdout(io.StringIO()):  # it prints what it does not find; the session below says what is missing
            onnxruntime.preload_dlls()  # of the packages that onnxruntime-gpu[cuda,cudnn] brings
    # The CPU runs the operators that a GPU provider has no kernel for.
    providers = list(dict.fromkeys([row.provider, TARGETS["cpu"].provider]))
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    release_memory()  # of what was put together while it loaded: scales of two bytes, planes of codes
    if session.get_providers()[0] != row.provider:
        raise InputError(
            f"onnxruntime could not start {row.provider} and would have run on the CPU; install the CUDA 13 and cuDNN 9 libraries "
            "that onnxruntime-gpu needs"
        )
    return session


def gpus() -> list[str]:
    """Name, driver and memory of each GPU that the driver shows."""
    return _smi("--query-gpu=name,driver_version,memory.total")


def gpu_memory(pid: int | None = None) -> int | None:
    """Bytes that a process (default: this one) holds on all GPUs, as the driver counts them; None when it does not list it.

    In a container the driver may list the process under another id: then None, never another process's memory.
    """
    rows = [line.split(",") for line in _smi("--query-compute-apps=pid,used_memory")]
    used = [row[1].strip() for row in rows if len(row) == 2 and row[0].strip() == str(pid or os.getpid())]
    return sum(int(value) << 20 for value in used) if used and all(value.isdigit() for value in used) else None


def _smi(query: str) -> list[str]:
    """The lines that nvidia-smi prints, none without a driver or a GPU."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    result = subprocess.run([program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    return [line for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []
