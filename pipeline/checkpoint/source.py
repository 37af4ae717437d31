"""What a user may call a source: a local folder, a hub id (of one revision: ``name/model@revision``), or ``reference``."""

from __future__ import annotations

import os
from pathlib import Path

from edgepress.models import REFERENCE
from edgepress.pipeline.artifact import folder_of
from edgepress.pipeline.checkpoint.admission import check_not_adapter
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import check_file, check_pointer, expanded, hub_snapshot, read_bytes

# Code (*.py) too: it is run only with --trust-remote-code (admission.py), and a model that brings code cannot load without it.
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve(source: str) -> Path:
    """The local folder of a source (or its GGUF file), downloaded from the hub when it is a hub id. Raises InputError."""
    if source == "reference":
        return REFERENCE
    path = folder_of(expanded(source))
    if path.is_dir():
        return _checked(_snapshot(path))
    if path.is_file() and path.suffix == ".gguf":
        check_pointer(path)
        return path
    if path.is_file():
        raise InputError(f"{source} is a file; give its folder, {path.parent}, or a .gguf file")
    if path.exists():
        check_file(path)  # a pipe, or a device
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1 or (os.sep != "/" and os.sep in source)
    if looks_local:
        kind = "file" if path.suffix == ".gguf" else "folder"
        raise InputError(
            f"no such {kind}: {source}; give a folder with config.json, a .gguf file, a hub id (name/model), or 'reference'"
        )
    return _checked(_download(source))


def _checked(folder: Path) -> Path:
    """The folder, unless its weights are something else than a model's. Raises InputError."""
    check_not_adapter(folder)
    if (gguf := sorted(folder.glob("*.gguf"))) and not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has its weights in GGUF files; give the file itself: {gguf[0]}")
    return folder


def _snapshot(folder: Path) -> Path:
    """The folder itself, or the snapshot in it where it is a model's folder in the hub's cache. Raises InputError."""
    root = folder.parent if folder.name == "snapshots" else folder
    if (folder / "config.json").exists() or not (root / "snapshots").is_dir():
        return folder
    found = {path.name: path for path in sorted((root / "snapshots").iterdir()) if path.is_dir()}
    main = root / "refs" / "main"
    if main.is_file() and (revision := read_bytes(main).decode(errors="replace").strip()) in found:
        return found[revision]
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise InputError(f"{folder} is a folder of the hub's cache without a snapshot; fetch the model again")
    raise InputError(f"{folder} has {len(found)} snapshots and no refs/main; give one of {root / 'snapshots'}: {', '.join(found)}")


def hub_origin(folder: Path) -> dict[str, str]:
    """The model and the commit that a folder of the hub's cache holds; nothing for any other folder."""
    if (snapshot := hub_snapshot(folder)) is None:
        return {}
    model = snapshot.parent.parent.name
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
