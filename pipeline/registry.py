"""Look-ups by name with "did you mean", imports on first use, and missing packages named with their cure."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from edgepress.pipeline.errors import MissingPackageError, OptionError

Row = TypeVar("Row")
# import name -> (distribution, extra that brings it)
PACKAGES = {
    "torch": ("torch", "build"),
    "transformers": ("transformers", "build"),
    "safetensors": ("safetensors", "build"),
    "onnx": ("onnx", "build"),
    "onnx_ir": ("onnx_ir", "build"),
    "onnxscript": ("onnxscript", "build"),
    "bitsandbytes": ("bitsandbytes", "build"),
    "gptqmodel": ("gptqmodel", "build"),
    "peft": ("peft", "build"),
    "gguf": ("gguf", "gguf"),
    "onnxruntime": ("onnxruntime", "cpu"),
    "jinja2": ("jinja2", "cpu"),
    "matplotlib": ("matplotlib", "report"),
    "lm_eval": ("lm-eval", "tasks"),
    "starlette": ("starlette", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "ray": ("ray", "sweep"),
    "prometheus_client": ("prometheus-client", "serve"),
}


# What is near in meaning, and not in letters.
_MEANT = {"gpu": "cuda", "nvidia": "cuda"}


def suggestion(name: str, names: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` or an empty string."""
    if (meant := _MEANT.get(name.lower())) in (names := list(names)):
        return f" (did you mean '{meant}'?)"
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def look_up(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """``table[name]``; raises OptionError that lists the names and the nearest one."""
    if name not in table:
        raise OptionError(f"unknown {kind} '{name}'{suggestion(name, table)}; there are: {', '.join(table)}")
    return table[name]


def load(reference: str) -> Any:
    """The object behind ``"package.module:name"``, imported now.

    Raises MissingPackageError when an optional package is absent; a package that is present but broken
    raises its own ImportError, so that a broken import is never reported as "not installed".
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        raise missing from error


def missing_package(error: ModuleNotFoundError) -> MissingPackageError | None:
    """What to raise, or to print, for an optional package that is not installed; None when it is none of ours."""
    package = (error.name or "").partition(".")[0]
    return _missing(package) if package in PACKAGES else None


def require(package: str) -> None:
    """Raise MissingPackageError unless an optional package is installed; it is not imported."""
    if importlib.util.find_spec(package) is None:
        raise _missing(package)


def _missing(package: str) -> MissingPackageError:
    if package not in PACKAGES:
        return MissingPackageError(f"{package} is not installed; pip install {package}")
    distribution, extra = PACKAGES[package]
    return MissingPackageError(f"{distribution} is not installed; in a clone of edgepress: pip install -e '.[{extra}]'")


def version(distribution: str) -> str | None:
    """Installed version, or None."""
    import importlib.metadata  # parsers of mail, which --help does without

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions of edgepress and of ``distributions``, absent ones left out."""
    found = {name: version(name) for name in ("edgepress", *distributions)}
    return {name: value for name, value in found.items() if value}


def double_runtime() -> str | None:
    """A one-line warning when onnxruntime and onnxruntime-gpu are both installed (they overwrite each other's files)."""
    if version("onnxruntime") and version("onnxruntime-gpu"):
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime (or onnxruntime-gpu)"
        )
    return None
