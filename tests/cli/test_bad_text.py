"""Texts that cannot be used end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusal import Refused, command

TEXTS: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "too short": ("a.txt", b"Only a few words.", ("too short", "give a longer text")),
    "empty": ("a.txt", b"", ("too short", "give a longer text")),
    "blank": ("a.txt", b" \t\n\xc2\xa0\xe2\x80\x8b" * 9000, ("too short", "no word", "give a longer text")),
    "missing": ("a.txt", None, ("cannot read the text", "No such file", "give")),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 4000, ("not UTF-8", "give a UTF-8")),
    "a folder": ("", None, ("text", "give")),
    "jsonl without text": ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', ("line 2", "'text' field", "it has body;", "--text-key")),
    "jsonl of numbers": ("a.jsonl", b'{"text": 3}\n', ("line 1", "'text' field is a number")),
    "jsonl that is none": ("a.jsonl", b"plain words\n", ("line 1", "'text' field", "not valid JSON")),
    "JSON named .txt": ("a.txt", b'{"messages": []}\n' * 999, ("line 1", "'text' field", "it has messages;", "--text-key")),
    "a table": ("a.csv", b"id,body\n1,x\n", ("line 2", "'text' field", "it has id, body;", "--text-key")),
    "compressed": ("a.jsonl.gz", b"\x1f\x8b\x08", ("compressed (gzip)", "unpack")),
    "UTF-16 without a mark": (
        "a.txt",
        "word ".encode("utf-16-le") * 999,
        ("not UTF-8", "NUL characters, as UTF-16", "give a UTF-8"),
    ),
}


@pytest.mark.parametrize("verb", ["prune", "export"])
@pytest.mark.parametrize("case", TEXTS)
def test_unusable_text(case: str, verb: str, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """Calibration text and evaluation text are read alike: named, with what would do."""
    name, content, says = TEXTS[case]
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / name).write_bytes(content)
    flag = "--calibration" if verb == "prune" else "--text"
    refused(*command(verb, tiny, tmp_path / "out"), flag, folder / name, says=(*says, str(folder)))


@pytest.mark.parametrize("flag", ["--calibration", "--other-text", "--text"])
def test_every_text_is_read_before_the_first_stage(flag: str, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A blank one is refused whichever stage would read it."""
    (tmp_path / "blank.txt").write_text("\n" * 50_000)
    refused(*command("build", tiny, tmp_path / "out"), flag, tmp_path / "blank.txt", says=("too short", "no word"))


def test_failed_build_leaves_no_folder(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """The first stage's failure leaves the disk as it was, also the OUT that was made for it."""
    refused(*command("build", tiny, tmp_path / "out"), "--calibration", tmp_path / "absent.txt", says="cannot read the text")
