"""Where Python looks for modules: never in the folder in which a command happens to be run, which may be a stranger's model.

Importing this takes that folder off the search path of the program ``edgepress``; a program that imports edgepress keeps its
own. It needs no module that is not loaded when Python starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence


def without_current_folder(entries: Iterable[str]) -> list[str]:
    """Entries of a search path that are not the current folder (as "" is); all of them where edgepress itself lies in it."""
    try:
        here = os.path.realpath(os.curdir)
    except FileNotFoundError:  # deleted: nothing can be in it
        return [entry for entry in entries if entry]
    if here == os.path.realpath(_holder(os.path.abspath(__file__), 3)):  # FOLDER/edgepress/pipeline/search_path.py
        return list(entries)
    return [entry for entry in entries if entry and os.path.realpath(entry) != here]


def _holder(path: str, levels: int) -> str:
    return _holder(os.path.dirname(path), levels - 1) if levels else path


def is_program(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether Python runs ``edgepress``, or a module of it by ``-m``, from sys.argv and sys.orig_argv."""
    if argv[:1] == ["-m"]:  # so it stands there until the module is found
        following = original[list(original).index("-m") + 1 :] if "-m" in original else []
        return bool(following) and following[0].startswith("edgepress.")
    return bool(argv) and os.path.splitext(os.path.basename(argv[0]))[0] == "edgepress"


def child_environment() -> dict[str, str]:
    """The environment of a child process in Python: it, and what it starts in turn, looks for nothing in the current folder."""
    entries = without_current_folder(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entries), "PYTHONSAFEPATH": "1"}


if is_program(sys.argv, sys.orig_argv):
    sys.path[:] = without_current_folder(sys.path)
