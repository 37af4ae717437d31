"""A benchmark on CUDA, where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from edgepress.pipeline.errors import InputError, MissingPackageError
from edgepress.pipeline.runtime import targets

SHORT = ["--repeats", "2", "--prompt-lengths", "8", "--new-tokens", "4", "--text-tokens", "256"]
Call = Callable[..., Any]


def test_cuda_names_the_missing_package(build: Path, text: Path, call: Call, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    result = call("bench", build, "--target", "cuda", "--text", text, "--out", tmp_path / "out", *SHORT)
    assert result.code == 2 and "onnxruntime-gpu is not installed" in result.err and "pip install '.[cuda]'" in result.err
    assert not list(tmp_path.iterdir())


def test_cuda_names_the_missing_gpu_and_the_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a session that quietly fell back to the CPU is refused: its figures would pass for the GPU's."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(targets, "gpus", lambda: [])
    with pytest.raises(InputError, match="no NVIDIA GPU is visible"):
        targets.target("cuda")
    monkeypatch.setattr(targets, "gpus", lambda: ["a GPU"])
    loaded: list[str] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("CUDA"))

    class Session:
        def __init__(self, model: str, options: object, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
            assert loaded, "libraries that pip installed are not found by themselves"

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(InputError, match="would have run on the CPU"):
        targets.session("model.onnx", None, "cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingPackageError, match="onnxruntime-gpu"):
        targets.target("cuda")


def test_gpu_memory_is_this_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the driver tells it; a process that it knows under another number is not guessed at."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{os.getpid()}, 300'\necho '1, 9000'\necho '{os.getpid()}, 12'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert targets.gpu_memory() == 312 << 20
    assert targets.gpu_memory(2) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert targets.gpu_memory() is None and targets.gpus() == []
