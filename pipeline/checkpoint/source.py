"""What a user may call a source: a local folder, a hub id (of one revision: ``name/model@revision``), or ``reference``."""

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


def hub_origin(folder: Path) -> dict[str, str]:
    """The model and the commit that a folder of the hub's cache holds; nothing for any other folder."""
    snapshot = Path(os.path.realpath(folder))
    model = snapshot.parent.parent.name
    if snapshot.parent.name != "snapshots" or not model.startswith("models--"):
        return {}
    return {"model": model.removeprefix("models--").replace("--", "/", 1), "revision": snapshot.name}


def _download(source: str) -> Path:
    """The snapshot of one commit: all of its files are of the same one, also when somebody pushes meanwhile."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=DOWNLOADED))
    except Exception as error:  # every failure of the hub client (offline, absent, gated) means the same here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no folder '{source}' here, and it could not be downloaded ({reason}); give a local folder, or go online"
        ) from error
