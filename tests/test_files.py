"""Files are written whole, in place of files alone."""

from __future__ import annotations

import os
from pathlib import Path

from edgepress.pipeline.files import read_json, write_json, write_whole


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
