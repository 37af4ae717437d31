"""From a file as people have it to one text: prose, JSON Lines, JSON arrays and CSV, in UTF-8 or with a byte-order mark.

Structured files are never read as prose: their rows have the text under a key that is stated, or they are refused by name.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from edgepress.pipeline.errors import TextError

log = logging.getLogger("edgepress")
KEY = "text"
SHOWN = 6  # keys of a row that an error lists
_Row = tuple[str, object]  # where it stands, for errors; what it is
# By the first bytes; UTF-32 goes before UTF-16, whose mark begins alike.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"(\xb5/\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))


def read_text(path: Path, key: str = KEY) -> str:
    """The text of a file: as it is, or what its rows have under ``key``, joined by blank lines.

    Rows are those of .jsonl, .json (an array, or lines), .csv and .tsv, in any case; a file of another name that holds JSON
    objects is read as such. A row's value is a text, or chat messages whose contents are texts. A lone surrogate, half of
    a character, becomes U+FFFD. Raises TextError for a text without a word, and one that names the line, and the
    keys found where ``key`` is not.
    """
    content = _decoded(path)
    if _structured(path, content):
        texts = (_text_of(path, where, row, key) for where, row in _rows(path, content))
        text = "\n\n".join(text for text in texts if text.strip())
    else:
        text = content.replace("\r\n", "\n").replace("\r", "\n")
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise TextError(f"{path} is too short: there is no word in it; give a longer text")
    try:
        text.encode()
    except UnicodeEncodeError:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two halves side by side are a character
        if broken := whole.count("\ufffd") - text.count("\ufffd"):
            _say_once(f"{path}: halves of characters (lone surrogates), replaced: {broken}")
        return whole
    return text


@cache
def _say_once(message: str) -> None:
    log.info(message)


def _decoded(path: Path) -> str:
    """The characters of a file. Raises TextError for what is no text."""
    try:
        if path.exists() and not path.is_file():
            raise TextError(f"cannot read the text {path}: not a file; give a UTF-8 .txt or .jsonl file")
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read the text {path}: {error.strerror}; give a UTF-8 .txt or .jsonl file") from error
    if packed := next((name for mark, name in _PACKED if content.startswith(mark)), None):
        raise TextError(f"{path} is compressed ({packed}); unpack it and give the UTF-8 text in it")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise TextError(
            f"{path} is not UTF-8 text: line {line} has NUL characters, as UTF-16 or a binary file has; give a UTF-8 file"
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(
            f"{path} is not UTF-8 text (line {line}); give a UTF-8 file: if this one is Latin-1, "
            f"iconv -f LATIN1 -t UTF-8 '{path}' > NEW converts it"
        ) from error


def _structured(path: Path, content: str) -> bool:
    """Whether a file holds rows: by its name, or because it begins with a JSON object."""
    if path.suffix.lower() in _READERS:
        return True
    start = content.lstrip()[:1]
    if start not in ("{", "["):
        return False
    line = next((line for line in content.splitlines() if line.strip()), "")
    for candidate in (line, content):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
    return False


def _rows(path: Path, content: str) -> Iterator[_Row]:
    return _READERS.get(path.suffix.lower(), _json)(path, content)


def _json_lines(path: Path, content: str) -> Iterator[_Row]:
    for number, line in enumerate(content.split("\n"), 1):  # no other separator: JSON allows U+2028 within a text
        if line.strip():
            yield f"line {number}", _parsed(path, f"line {number}", line)


def _json(path: Path, content: str) -> Iterator[_Row]:
    """An array of rows, or one row a line."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        if content.lstrip().startswith("["):
            _parsed(path, "the array", content)  # raises
        yield from _json_lines(path, content)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"row {number}", row


def _parsed(path: Path, where: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number too long"
        raise TextError(
            f"{path}, {where}: not valid JSON ({reason}); correct it, or give prose as a .txt file (rows are objects with a "
            f"'{KEY}' field)"
        ) from error


def _table(delimiter: str) -> Callable[[Path, str], Iterator[_Row]]:
    def rows(path: Path, content: str) -> Iterator[_Row]:
        csv.field_size_limit(sys.maxsize)  # a field may be a chapter
        reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", {str(name): value for name, value in row.items() if name is not None}
        except csv.Error as error:
            raise TextError(
                f"{path}, line {reader.line_num}: not valid CSV ({error}); correct it, or give a .jsonl file"
            ) from error

    return rows


_READERS: dict[str, Callable[[Path, str], Iterator[_Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


def _text_of(path: Path, where: str, row: object, key: str) -> str:
    """What a row has under ``key``. Raises TextError."""
    if not isinstance(row, dict):
        raise TextError(f"{path}, {where}: not a JSON object; it must be one, with a '{key}' field")
    if key not in row:
        keys = ", ".join(list(map(str, row))[:SHOWN]) + (", ..." if len(row) > SHOWN else "")
        found = f"it has {keys}; give the one with the text as --text-key" if row else "it is empty; correct it"
        raise TextError(f"{path}, {where}: no '{key}' field; {found}")
    value = row[key]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        contents = [item.get("content", item.get("value")) if isinstance(item, dict) else None for item in value]
        if all(isinstance(content, str) for content in contents):
            return "\n\n".join(map(str, contents))
    kind = {type(None): "null", bool: "true or false", list: "a list of something else", dict: "an object"}.get(
        type(value), "a number"
    )
    raise TextError(
        f"{path}, {where}: the '{key}' field is {kind}; it must be a text, or chat messages whose content is a text each"
    )
