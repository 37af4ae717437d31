"""Artifacts that a test has changed: their manifests must say so, or they are refused for their sha256."""

from __future__ import annotations

from pathlib import Path

from edgepress.pipeline.files import read_json, sha256, write_json


def recorded(folder: Path, *names: str) -> None:
    """Write the present sha256 of these files into the manifest, if there is one."""
    if (folder / "manifest.json").is_file():
        manifest = read_json(folder / "manifest.json")
        for name in names:
            manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        write_json(folder / "manifest.json", manifest)
