"""Report files: written next to an artifact, gathered from several folders, saved as .html, .md or .json."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import not_a_folder, real, write_whole
from edgepress.pipeline.report import model
from edgepress.pipeline.report.model import Comparison, Report, ReportFile
from edgepress.pipeline.report.text import markdown

log = logging.getLogger("edgepress")
NAME = "report.json"


def write(content: ReportFile, folder: Path) -> None:
    """report.json, report.md and, where matplotlib is installed, report.html."""
    for name in (NAME, "report.md"):
        save(content, folder / name)
    if importlib.util.find_spec("matplotlib") is None:
        log.info("bench: no report.html because matplotlib is not installed (in a clone of edgepress: pip install '.[report]')")
    else:
        save(content, folder / "report.html")


def save(content: ReportFile, file: Path) -> None:
    """One file, in the format that its suffix names. Raises OptionError for a suffix that is none of .html, .md and .json."""
    if file.suffix == ".html":
        from edgepress.pipeline.report.html import html

        write_whole(file, html(content))
    elif file.suffix == ".md":
        write_whole(file, markdown(content))
    elif file.suffix == ".json":
        model.write(content, file)
    else:
        raise OptionError(f"--out {file} is not a report format; use a name that ends in .html, .md or .json")


def gather(folders: list[Path]) -> ReportFile:
    """The reports in several folders as one, each artifact once; a folder may be a report, the OUT of a build, or an artifact.

    Artifacts of different runs were not measured in interleaved rounds: their speeds are listed and not compared.
    Raises InputError for a folder without a report, and for a report that cannot be read.
    """
    reports: dict[tuple[str, str], Report] = {}
    comparisons: list[Comparison] = []
    for folder in folders:
        content = model.read(_report_file(folder))
        comparisons += content.comparisons
        for report in content.reports:
            reports.setdefault((report.identity, report.artifact), report)
    return ReportFile(tuple(reports.values()), tuple(comparisons))


def _report_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{not_a_folder(folder)}; give a folder that edgepress bench or build wrote")
    path = real(folder)
    candidates = [
        path,
        *sorted(path.glob("[0-9][0-9]-bench")),
        path.parent / f"{path.name}-bench",
        *sorted(path.parent.glob("[0-9][0-9]-bench")),
    ]
    file = next((candidate / NAME for candidate in candidates if (candidate / NAME).is_file()), None)
    if file is None:
        raise InputError(f"no report of {folder}; measure it first: edgepress bench {folder}")
    return file
