"""What an artifact is measured on: one row a target, and the one place that chooses onnxruntime's execution provider."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edgepress.pipeline.errors import InputError, MissingPackageError
from edgepress.pipeline.registry import load, look_up


@dataclass(frozen=True)
class Target:
    """provider: onnxruntime's name for it; device: where the key-value cache lives, as OrtValue names it."""

    provider: str
    device: str


TARGETS = {
    "cpu": Target("CPUExecutionProvider", "cpu"),
    "cuda": Target("CUDAExecutionProvider", "cuda"),
}


def target(name: str) -> Target:
    """The row of a target that this machine has. Raises MissingPackageError or InputError that names what is missing."""
    row = look_up(TARGETS, name, "target")
    if name == "cuda":
        known: list[str] = []
        with suppress(MissingPackageError):  # which names the extra for the CPU
            known = load("onnxruntime:get_available_providers")()
        if row.provider not in known:
            raise MissingPackageError(
                "onnxruntime-gpu is not installed (the onnxruntime that is here, if any, has no CUDA); "
                "in an environment without onnxruntime: pip install '.[cuda]'"
            )
        if not gpus():
            raise InputError("no NVIDIA GPU is visible (nvidia-smi lists none); use a machine that has one, or --target cpu")
    return row


def session(model: str, options: Any, name: str = "cpu") -> Any:
    """An InferenceSession on a target. Raises InputError when onnxruntime quietly fell back to another provider."""
    import onnxruntime

    row = target(name)
    # The CPU stays as the place for operators that a GPU provider has no kernel for.
    providers = list(dict.fromkeys([row.provider, TARGETS["cpu"].provider]))
    made = onnxruntime.InferenceSession(model, options, providers=providers)
    if made.get_providers()[0] != row.provider:
        raise InputError(
            f"onnxruntime could not start {row.provider} and would have run on the CPU; install the CUDA 13 and cuDNN 9 libraries "
            "that onnxruntime-gpu needs"
        )
    return made


def gpus() -> list[str]:
    """Name, driver and memory of each GPU that the driver shows."""
    return _smi("--query-gpu=name,driver_version,memory.total")


def gpu_memory(pid: int | None = None) -> int | None:
    """Bytes that a process (default: this one) holds on all GPUs, as the driver counts them; None when it does not tell.

    In a container the driver may know the process under another number: then None, never another process's memory.
    """
    rows = [line.split(",") for line in _smi("--query-compute-apps=pid,used_memory")]
    used = [row[1].strip() for row in rows if len(row) == 2 and row[0].strip() == str(pid or os.getpid())]
    return sum(int(value) << 20 for value in used) if used and all(value.isdigit() for value in used) else None


def _smi(query: str) -> list[str]:
    """Lines that nvidia-smi answers, none without a driver or a GPU."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    done = subprocess.run([program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
