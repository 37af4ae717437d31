"""One edgepress writes a folder; who comes second learns who that is, and who died is in nobody's way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest
from edgepress.pipeline import interrupt, lock
from edgepress.pipeline.errors import OutputError
from edgepress.pipeline.lock import lock_file, writing
from refusal import check_refusal, command


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)


@contextmanager
def another(out: Path, build: bool = False) -> Iterator[threading.Event]:
    """Another writer: a thread knows nothing of what this one holds. It ends when the event is set."""
    begun, end = threading.Event(), threading.Event()

    def write() -> None:
        with writing(out, build=build):
            begun.set()
            end.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    assert begun.wait(10)
    try:
        yield end
    finally:
        end.set()
        thread.join()


def left(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def test_second_command_learns_who_writes(call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """Process, machine, command and time, in one line; nothing is touched, and nothing stays behind."""
    with another(tmp_path / "out"):
        result = call(*command("quantize", tiny, tmp_path / "out"))
    check_refusal(result.code, result.err, (f"process {os.getpid()} on", "is being written by", "since 2", "choose another output"))
    with another(tmp_path / "out", build=True):
        result = call(*command("build", tiny, tmp_path / "out"))
    check_refusal(result.code, result.err, (str(tmp_path / "out"), "is being written by"))
    assert left(tmp_path) == []
    assert call(*command("quantize", tiny, tmp_path / "out")).code == 0 and [p.name for p in tmp_path.iterdir()] == ["out"]


BUILD, STAGE = True, False


@pytest.mark.parametrize(
    ("one", "other", "free"),
    [
        (("out", BUILD), ("out", BUILD), False),
        (("out", STAGE), ("out", STAGE), False),
        (("out", STAGE), ("out", BUILD), False),
        (("out", BUILD), ("out/01-prune", STAGE), False),
        (("out", BUILD), ("out/baseline/01-quantize", STAGE), False),
        (("out", STAGE), ("out/mine", STAGE), False),  # the whole of out is replaced
        (("out", STAGE), ("out/mine", BUILD), False),
        (("out", BUILD), ("out/mine", STAGE), True),
        (("out", BUILD), ("out/mine", BUILD), True),
        (("out/a", BUILD), ("out/b", BUILD), True),
        (("out/a", STAGE), ("out/b", STAGE), True),
        (("out/01-prune", STAGE), ("out/02-quantize", STAGE), True),
    ],
)
def test_what_excludes_what(one: tuple[str, bool], other: tuple[str, bool], free: bool, tmp_path: Path) -> None:
    """Whichever comes first: a build and its stages, a folder and what is in it; nothing else."""
    for (first, first_builds), (second, second_builds) in ((one, other), (other, one)):
        with another(tmp_path / first, first_builds):
            if free:
                with writing(tmp_path / second, build=second_builds):
                    pass
            else:
                with pytest.raises(OutputError, match="being written"), writing(tmp_path / second, build=second_builds):
                    pass
        assert left(tmp_path) == []


def test_links_lead_to_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with another(tmp_path / "out", build=True), pytest.raises(OutputError), writing(tmp_path / "link", build=True):
        pass


def test_a_build_does_not_lock_itself_out(tmp_path: Path) -> None:
    with writing(tmp_path / "out", build=True), writing(tmp_path / "out" / "01-prune"):
        assert (tmp_path / "out" / ".edgepress-lock").is_file()
    assert left(tmp_path) == []


def test_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a folder that nobody chose, as that of an imported GGUF: with a line, and until the other has ended."""
    caplog.set_level("INFO", "edgepress")
    with another(tmp_path / "out") as end:
        threading.Timer(0.3, end.set).start()
        with writing(tmp_path / "out", wait=True):
            assert end.is_set()
    assert [m.startswith("waiting: ") and f"process {os.getpid()}" in m for m in caplog.messages] == [True]


DIES = "import os, sys; from pathlib import Path; from edgepress.pipeline.lock import writing\n"
DIES += "with writing(Path(sys.argv[1]), build=True): os._exit(9)"


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """What a killed one leaves stops nobody, is nobody's, and goes with the next."""
    assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "out")]).returncode == 9
    assert sorted(left(tmp_path)) == ["out", "out/.edgepress-lease", "out/.edgepress-lock"]
    with writing(tmp_path / "out"):  # a stage may take the place of what is no build
        assert left(tmp_path / "out") == []
    with writing(tmp_path / "out", build=True):
        pass
    assert left(tmp_path / "out") == []


def test_killed_before_it_wrote_who_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filelock takes an empty lease for a living one forever."""
    monkeypatch.setattr(lock.time, "sleep", lambda _: None)
    (tmp_path / ".edgepress-lease").touch()
    (tmp_path / ".edgepress-lock").touch()
    with writing(tmp_path, build=True):
        pass
    assert left(tmp_path) == []


def test_child_that_outlives_its_parent(tmp_path: Path) -> None:
    """The process that GPTQ runs in goes on for a moment after its parent was killed, and still writes."""
    with writing(tmp_path / "out", build=True), subprocess.Popen(["sleep", "60"], pass_fds=lock.descriptors()) as child:
        file = lock_file(tmp_path / "out", True)
        held = lock._mine.held[0]
        replacement = os.open(os.devnull, os.O_RDONLY)
        os.dup2(replacement, held.descriptor)  # as the end of the parent closes it
        os.close(replacement)
        held.lease.release()
        assert lock._take(tmp_path, file, os.O_RDWR) is None
        child.kill()
        child.wait()
        taken = lock._take(tmp_path, file, os.O_RDWR)
        assert taken is not None
        os.close(taken.descriptor)
        taken.lease.release()


def elsewhere(out: Path, seconds: float) -> Path:
    """The lease of another machine, where this one knows nothing of its processes."""
    out.mkdir()
    lease = out / ".edgepress-lease"
    lease.write_text(f"filelock/2\npid=7\nhost=elsewhere\nmode=lease\ntoken=abc\nduration={seconds!r}\n")
    record = f"{out}\nedgepress build\x1b[31m a {out}\n7\nelsewhere\n2026-11-26 04:00:00 UTC"
    (out / ".edgepress-lock").write_text(record)
    return lease


def test_dead_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sign of life for as long as it would have given several."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    elsewhere(tmp_path / "out", 0.4)
    with writing(tmp_path / "out", build=True):
        pass
    assert left(tmp_path / "out") == []


def test_alive_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It renews its lease: the folder is its own, though the system's lock is not seen from here."""
    caplog.set_level("INFO", "edgepress")
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    lease, ended = elsewhere(tmp_path / "out", 0.4), threading.Event()

    def renew() -> None:
        while not ended.wait(0.05):
            os.utime(lease)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OutputError, match=r"\(process 7 on elsewhere, since 2026-11-26"), writing(tmp_path / "out", build=True):
            pass
    finally:
        ended.set()
        thread.join()
    assert "sign of life" in caplog.messages[0] and "\x1b" not in caplog.messages[0]
    assert len(left(tmp_path / "out")) == 2


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease alone keeps two apart, and ends with its process on the same machine."""

    def unsupported(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(filelock, "lock_descriptor", unsupported)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    with another(tmp_path / "out", build=True), pytest.raises(OutputError), writing(tmp_path / "out", build=True):
        pass
    assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "out")]).returncode == 9
    begun = time.monotonic()
    with writing(tmp_path / "out", build=True):
        assert time.monotonic() - begun < 30
    assert left(tmp_path) == ["out"]


def test_nothing_to_lock_where_nobody_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished build on a read-only disk is shown as before."""
    monkeypatch.setattr(lock.os, "access", lambda *_, **__: False)
    with writing(tmp_path / "out", build=True):
        assert left(tmp_path) == []


@pytest.mark.parametrize("planted", ["a link", "a dead link", "a folder", "a pipe"])
def test_something_else_in_its_place(planted: str, tmp_path: Path) -> None:
    """Not followed, not waited for, not removed."""
    place = lock_file(tmp_path / "out", False)
    (tmp_path / "precious").write_text("years of work")
    if "link" in planted:
        place.symlink_to("precious" if planted == "a link" else "nothing")
    else:
        {"a folder": place.mkdir, "a pipe": lambda: os.mkfifo(place)}[planted]()
    with pytest.raises(OutputError, match="choose another output folder"), writing(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "years of work"
    assert sorted(left(tmp_path)) == sorted([place.name, "precious"])


def test_long_names(tmp_path: Path) -> None:
    """Filelock needs room for names of its own beside the lease."""
    with writing(tmp_path / ("x" * 240)):
        assert all(len(name) < 100 for name in left(tmp_path))
    assert left(tmp_path) == []


def test_interrupted_while_it_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A polite end leaves nothing, at whichever step the signal comes."""
    real, interrupts = Path.unlink, [True]

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".edgepress-lock" and interrupts:
            interrupts.pop()
            raise KeyboardInterrupt
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", build=True):
        pass
    assert left(tmp_path) == [] and not interrupts


def test_folder_that_is_replaced_with_the_lock_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stage that ends just then: a lock that is gone keeps nobody out, so it is taken anew."""
    out, moves = tmp_path / "out", [True]

    def around(*_: object) -> Iterator[Path]:
        if moves and moves.pop():
            out.rename(tmp_path / "former")
            out.mkdir()
        return iter(())

    monkeypatch.setattr(lock, "PATIENCE", 2.0)
    monkeypatch.setattr(lock, "_around", around)
    with writing(out, build=True):
        assert (out / ".edgepress-lock").is_file() and not moves


def test_interrupted_while_it_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file goes again; that of another, which it waited for, stays."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(filelock.SoftFileLease, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", build=True):
        pass
    assert left(tmp_path) == []
    elsewhere(tmp_path / "out", 30.0)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", build=True):
        pass
    assert len(left(tmp_path / "out")) == 2


@pytest.mark.parametrize("step", ["lock_descriptor", "SoftFileLease"])
def test_signal_at_a_step_of_taking_the_lock(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It interrupts when the lock is noted: what a step has just made would be known to nobody yet, and be left behind."""
    real = getattr(filelock, step)

    def signalled(*arguments: object, **settings: object) -> object:
        result = real(*arguments, **settings)
        interrupt.stop(15, None)
        return result

    monkeypatch.setattr(filelock, step, signalled)
    try:
        with pytest.raises(KeyboardInterrupt), writing(tmp_path / "out", build=True):
            raise AssertionError("it was interrupted before")
        assert left(tmp_path) == []
    finally:
        interrupt.forget()
