"""What a user may call a source: a local folder, a hub id, or ``reference``."""

from __future__ import annotations

import os
from pathlib import Path

from edgepress.models import REFERENCE
from edgepress.pipeline.errors import InputError

# Code (*.py) too: it is run only with --trust-remote-code (admission.py), and a model that brings code cannot load without it.
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve(source: str) -> Path:
    """The local folder of a source (or its GGUF file), downloaded from the hub when it is a hub id. Raises InputError."""
    if source == "reference":
        return REFERENCE
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or (os.sep != "/" and os.sep in source)
    if path.exists() or looks_local:
        raise InputError(
            f"no such folder: {source}; give a folder with config.json, a .gguf file, a hub id (name/model), or 'reference'"
        )
    return _download(source)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except Exception as error:  # every failure of the hub client (offline, absent, gated) means the same here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no folder '{name}' here, and it could not be downloaded ({reason}); give a local folder, or go online"
        ) from error
