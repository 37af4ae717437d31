"""Files are written whole, in place of files alone."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import files
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import atomic_folder, leads_out, link_or_copy, read_json, real, sha256, write_json, write_whole
from safetensors.numpy import save_file


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any name that it has; and one that changed a moment ago each time, for it could again within a tick of the clock."""
    read, digest = list[str](), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1])
    monkeypatch.setattr(files, "_WORTH_KEEPING", 8)
    file, link = tmp_path / "weights", tmp_path / "link"
    file.write_bytes(b"12345678")
    os.link(file, link)
    first = sha256(file)
    assert sha256(file) == first and len(read) == 2
    os.utime(file, ns=(0, 10**18))
    assert sha256(file) == sha256(link) == first and len(read) == 3
    file.write_bytes(b"87654321")
    assert sha256(link) != first and len(read) == 4
    small = tmp_path / "small"
    small.write_bytes(b"1234567")
    os.utime(small, ns=(0, 10**18))
    assert sha256(small) == sha256(small) and len(read) == 6


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    """Whoever may write to /dev would lose the device: --out /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, "text")
        assert pipe.is_fifo() and os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("file.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "file.json") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    """Also behind a folder that is not there; any other path is where it leads."""
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "out", tmp_path / "missing" / ".." / "loop"):
        with pytest.raises(InputError, match="leads back to itself"):
            real(path)
    with pytest.raises(InputError, match="leads back to itself"):
        write_whole(tmp_path / "loop", "text")
    (tmp_path / "link").symlink_to("folder")
    assert real(tmp_path / "link" / "new") == real(tmp_path) / "folder" / "new"


@pytest.mark.parametrize("below", ["", "sub"])
def test_blobs_of_a_hub_cache_are_no_way_out(below: str, tmp_path: Path) -> None:
    """Also where they lie on another disk, and for a model in a folder of its repository."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "b1").write_text("{}")
    repository = tmp_path / "models--a--b"
    folder = repository / "snapshots" / "0123abc" / below
    folder.mkdir(parents=True)
    (repository / "blobs").symlink_to(tmp_path / "disk")
    (folder / "config.json").symlink_to(repository / "blobs" / "b1")
    (folder / "other.json").symlink_to(tmp_path)
    assert not leads_out(folder, folder / "config.json") and leads_out(folder, folder / "other.json")


def test_a_second_name_is_that_of_the_file(tmp_path: Path) -> None:
    """All files of a hub cache are links: a link to a link would point nowhere in another folder."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "cache" / "model.safetensors").symlink_to("../blob")
    (tmp_path / "out" / "deep").mkdir(parents=True)
    link_or_copy(tmp_path / "cache" / "model.safetensors", target := tmp_path / "out" / "deep" / "model.safetensors")
    assert not target.is_symlink() and target.read_bytes() == b"weights"


def test_files_are_as_readable_as_any(tmp_path: Path) -> None:
    """Safetensors makes its own for the owner alone, and a colleague could not read the folder."""
    with atomic_folder(tmp_path / "out") as folder:
        save_file({"a": np.zeros(3)}, folder / "a.safetensors")
        (folder / "plain").touch()
        (kept := folder / "own").touch(mode=0o400)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes["a.safetensors"] == modes["plain"] and modes[kept.name] == 0o400
