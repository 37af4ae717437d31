"""Memory of this process: peak RSS, and PSS, as the system reports them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def peak_rss() -> int | None:
    """Peak resident bytes of this process; None where the system does not report them.

    VmHWM, not ru_maxrss: the latter is inherited over exec, so a child of a big process starts with its parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        if os.name != "posix":
            return None
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pss() -> int | None:
    """Proportional set size now; the kernel keeps no peak of it."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * next(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
