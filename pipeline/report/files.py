"""Report files: written beside an artifact, gathered from several folders, saved as .html, .md or .json."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.report.tables import (
    reports_of,
)
from edgepress.pipeline.report.text import markdown

log = logging.getLogger("edgepress")


def write(content: dict[str, Any], folder: Path) -> None:
    """report.json, report.md and, where matplotlib is installed, report.html."""
    write_json(folder / "report.json", content)
    (folder / "report.md").write_text(markdown(content), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log.info("bench: no report.html, for matplotlib is not installed (in a clone of edgepress: pip install '.[report]')")
    else:
        save(content, folder / "report.html")


def save(content: dict[str, Any], file: Path) -> None:
    """One file, in the format that its suffix names. Raises OptionError for a suffix that is none of .html, .md and .json."""
    if file.suffix == ".html":
        from edgepress.pipeline.report.html import html

        file.write_text(html(content), encoding="utf-8")
    elif file.suffix == ".md":
        file.write_text(markdown(content), encoding="utf-8")
    elif file.suffix == ".json":
        write_json(file, content)
    else:
        raise OptionError(f"--out {file} is no report; end its name in .html, .md or .json")


def gather(folders: list[Path]) -> dict[str, Any]:
    """The reports in several folders as one, each artifact once; a folder may be a report, the OUT of a build, or an artifact.

    Artifacts of different runs were not measured in turn: their speeds stand beside each other and are not compared.
    Raises InputError for a folder without a report.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    compared = []
    for folder in folders:
        content = read_json(_report_file(folder))
        if "figures" not in content or content.get("schema") != 2:
            raise InputError(f"{_report_file(folder)} was written by another edgepress; run edgepress bench again")
        compared += content.get("comparisons", [])
        for report in reports_of(content):
            found.setdefault(
                (report["identity"], report["artifact"]), {k: v for k, v in report.items() if k not in ("beside", "comparisons")}
            )
    first, *others = found.values()
    return first | {"beside": others, "comparisons": compared}


def _report_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give a folder that edgepress bench or build wrote")
    own = folder.resolve()
    places = [
        own,
        *sorted(own.glob("[0-9][0-9]-bench")),
        own.parent / f"{own.name}-bench",
        *sorted(own.parent.glob("[0-9][0-9]-bench")),
    ]
    found = next((place / "report.json" for place in places if (place / "report.json").is_file()), None)
    if found is None:
        raise InputError(f"no report of {folder}; measure it first: edgepress bench {folder}")
    return found
