"""One writer a folder: a lock that ends with its process, and tells whoever comes second who works there."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepress.pipeline import interrupt
from edgepress.pipeline.errors import InputError, OutputError
from edgepress.pipeline.files import read_bytes, real

if TYPE_CHECKING:
    from filelock import SoftFileLease

log = logging.getLogger("edgepress")
LOCK, LEASE = "edgepress-lock", "edgepress-lease"
# Seconds without a sign of life after which a holder on another machine counts as dead.
LEASE_SECONDS = 30.0
# Seconds that a second command waits before it gives up: one that was killed has children that need a moment to see it.
PATIENCE = 2.0


@dataclass(frozen=True)
class _Held:
    """A lock that this process holds: the folder it is about, its file, the open file that is locked, its sign of life."""

    out: Path
    file: Path
    descriptor: int
    lease: SoftFileLease

    def release(self) -> None:
        """Remove its files while it is still held, so that no one can hold a file that is going."""
        try:
            self._remove()
        except BaseException:  # a signal came in between
            self._remove()
            raise
        finally:
            os.close(self.descriptor)

    def _remove(self) -> None:
        self.lease.release()
        if _is_at(self.descriptor, self.file):
            with suppress(OSError):
                self.file.unlink()


class _Mine(threading.local):
    def __init__(self) -> None:
        self.held: list[_Held] = []


_mine = _Mine()


@contextmanager
def writing(out: Path, *, build: bool = False, wait: bool = False) -> Iterator[None]:
    """Be the only edgepress that writes ``out``, or what lies in it.

    build: ``out`` is the folder of a build, which writes only its numbered stages, and not replaced as a whole. wait: until
    another has ended, instead of raising OutputError, which names it. Where nobody may write there is nothing to lock.

    Two locks in one: the system's on an open file, which ends with the process however that ends, and a file that is renewed
    every few seconds, for file systems whose locks are unknown to other machines. Neither lies in a folder that is shipped.
    """
    out = real(out)
    file = lock_file(out, build)
    created = [parent for parent in file.parents if not parent.exists()]
    there = next(parent for parent in file.parents if parent.exists())
    if any(held.out in (out, *out.parents) for held in _mine.held) or not os.access(there, os.W_OK):
        yield
        return
    held: list[_Held] = []
    try:
        try:
            _acquire(out, file, build, wait, held)
            yield
        finally:
            with interrupt.held_back():
                for one in held:
                    _mine.held.remove(one)
                    one.release()
    finally:
        for parent in created:
            with suppress(OSError):  # it holds what was written, or another's lock
                parent.rmdir()


def descriptors() -> tuple[int, ...]:
    """What a child process that writes must inherit, so that the folder stays locked until both have ended."""
    return tuple(held.descriptor for held in _mine.held) if os.name == "posix" else ()


def lock_file(out: Path, build: bool) -> Path:
    """In the folder of a build, and beside that of a stage, which is replaced as a whole."""
    if build:
        return out / f".{LOCK}"
    name = out.name if len(out.name) < 150 else hashlib.sha256(out.name.encode()).hexdigest()
    return out.parent / f".{name}.{LOCK}"


def _acquire(out: Path, file: Path, build: bool, wait: bool, into: list[_Held]) -> None:
    """Get the lock into ``into``, and among those that are held. A signal in between would leave its files behind."""
    deadline, said = time.monotonic() + PATIENCE, ""
    while not into:
        with interrupt.held_back():
            taken = _attempt(out, file, build)
            if isinstance(taken, _Held):
                _mine.held.append(taken)
                into.append(taken)
                return
        who = _holder(taken)
        if not wait and time.monotonic() > deadline:
            raise OutputError(f"{who}; wait until that has ended, or choose another output folder")
        if wait and who != said:
            log.info("waiting: %s", who)
            said = who
        time.sleep(0.1)


def _attempt(out: Path, file: Path, build: bool) -> _Held | Path:
    """The lock; or the file of the one in the way, which may be that of a folder around or inside.

    Whoever comes announces itself first and looks around then: of two at once, at least one sees the other.
    """
    made = False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        made = True
        held = _take(out, file, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        if not made or file.parent.exists():  # /proc answers so
            raise OutputError(f"cannot write to {file.parent}; choose another output folder") from None
        return file  # removed by another that ended just now
    except OSError as error:
        raise OutputError(f"cannot write to {file.parent}: {error.strerror}; choose another output folder") from error
    if held is None:
        return file
    try:
        in_the_way = next((other for other in _around(out, build) if other != file and _is_held(other)), None)
        if in_the_way is None and not _is_at(held.descriptor, file):  # a stage has replaced its folder
            in_the_way = file
        if in_the_way is None:
            os.write(held.descriptor, _record(out).encode(errors="replace"))
            return held
    except BaseException:
        held.release()
        raise
    held.release()
    return in_the_way


def _around(out: Path, build: bool) -> Iterator[Path]:
    """The files of locks that exclude this one: of stages around it, of builds that it is a stage of, of all inside it."""
    inside = out
    yield lock_file(out, True)
    for folder in (out, *out.parents):
        yield lock_file(folder, False)
        if inside != folder and (inside.name[:2].isdigit() or inside.name == "baseline"):
            yield lock_file(folder, True)
        inside = folder
    for pattern in ("", "baseline/"):
        yield from out.glob(f"{pattern}.[0-9][0-9]-*{LOCK}" if build else f"{pattern or '*/'}*{LOCK}")
    if not build:
        yield from out.glob(f"*{LOCK}")


def _is_held(file: Path) -> bool:
    """Whether another holds a lock; what a dead one left is removed."""
    if any(held.file == file for held in _mine.held) or not file.is_file():
        return False
    try:
        held = _take(file.parent, file, os.O_RDONLY)
    except OSError:  # gone just now, or another user's
        return False
    if held is not None:
        held.release()
    return held is None


def _take(out: Path, file: Path, flags: int) -> _Held | None:
    """The lock, or None when another holds it."""
    from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout, lock_descriptor

    # a link in its place is not followed, a pipe not waited for
    descriptor = os.open(file, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    held, locked = None, False
    try:
        try:
            locked = lock_descriptor(descriptor, blocking=False)
            free = locked
        except OSError:  # a file system without locks: the lease alone decides
            free = True
        if free and _is_at(descriptor, file):
            lease_file = file.with_name(file.name.removesuffix(LOCK) + LEASE)
            _clear_unfinished(lease_file)
            lease = SoftFileLease(lease_file, lease_duration=LEASE_SECONDS)
            begun, said = time.monotonic(), False
            while held is None:
                try:
                    lease.acquire(timeout=0.2)
                    held = _Held(out, file, descriptor, lease)
                except Timeout:
                    if not said:
                        log.info("waiting up to %.0f s for a sign of life: %s", 1.2 * LEASE_SECONDS, _holder(file))
                    said = True
                    interrupt.check()
                    if time.monotonic() > begun + 1.2 * LEASE_SECONDS:
                        raise
    except (Timeout, LeaseSettingsMismatch):
        pass
    except RuntimeError as error:  # no memory for the thread that renews the lease
        raise MemoryError from error
    finally:
        if held is None:
            if locked and not os.fstat(descriptor).st_size and _is_at(descriptor, file):  # a signal came: as if it had not begun
                with suppress(OSError):  # Windows removes no open file
                    file.unlink()
            os.close(descriptor)
    return held


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one of that name still: its former holder may have removed it."""
    with suppress(FileNotFoundError):
        mine, there = os.fstat(descriptor), file.lstat()
        return stat.S_ISREG(mine.st_mode) and (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
    return False


def _clear_unfinished(lease_file: Path) -> None:
    """Remove an empty lease, which filelock never does: its process was killed before it wrote who it was."""
    with suppress(FileNotFoundError):
        if not lease_file.stat().st_size:
            time.sleep(1)
            if not lease_file.stat().st_size:
                lease_file.unlink()


def _record(out: Path) -> str:
    """What the others are told: folder, command, process, machine, time; a line each."""
    import socket  # not needed for --help

    program = Path(sys.argv[0]).name
    command = shlex.join(["edgepress" if program == "__main__.py" else program, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return "\n".join(" ".join(part.split()) for part in (str(out), command[:200], str(os.getpid()), socket.gethostname(), since))


def _holder(file: Path) -> str:
    """Who holds a lock, in words fit for a terminal."""
    try:
        content = read_bytes(file, 5000).decode(errors="replace") if file.is_file() else ""
    except (OSError, InputError):
        content = ""
    parts = ["".join(c if c.isprintable() else "?" for c in line) for line in content.split("\n")]
    if len(parts) != 5:  # it has not written it yet
        return f"another edgepress works in {file.parent}, as {file.name} there says"
    out, command, pid, host, since = parts
    return f"{out} is being written by '{command}' (process {pid} on {host}, since {since})"
