"""The door of JSON and YAML: what is ambiguous, endless or no Unicode is one line, whatever reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from edgepress.pipeline import documents
from edgepress.pipeline.documents import DocumentError, parse_json, parse_object, parse_yaml, short_line, shown, typed
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import read_json

DEEP = "[" * 3000 + "]" * 3000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_JSON = {
    '{"a": NaN}': "it holds NaN",
    '{"a": -Infinity}': "it holds -Infinity",
    '{"a": 1e999}': "not finite",
    "1" + "0" * 5000: "4300 digits",
    DEEP: "nested more than 64 deep",
    "[" * 70 + "]" * 70: "nested more than 64 deep",
    '{"a":' * 20000 + "1" + "}" * 20000: "nested more than 64 deep",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' stands twice",
    '{"a": "\\ud800"}': "surrogate",
    '{"\\ud800": 1}': "surrogate",
    "": "not valid JSON",
    "{'a': 1}": "not valid JSON",
    "[" + "0," * 2_000_000 + "0]": "more than 2,000,000 values",
    "[" + "[]," * 1_000_000 + "0]": "more than 2,000,000 values",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert BAD_JSON[text] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_json_that_is_read() -> None:
    """Also a byte-order mark, whole pairs of surrogates, and the number of 31 digits that tokenizer configs have."""
    assert parse_json(b"\xef\xbb\xbf[1, 2.5]") == [1, 2.5]
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json(str(int(1e30))) == int(1e30)
    assert parse_json("[" * 60 + "]" * 60)
    with pytest.raises(DocumentError, match="not a JSON object"):
        parse_object("[]")
    with pytest.raises(DocumentError, match="utf-8"):
        parse_json(b"\xff\xfe{")


def test_a_file_names_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no file, too large or no object: InputError with its path."""
    file = tmp_path / "config.json"
    for content, says in (("{}x", "not valid JSON"), ("5", "not a JSON object"), ('{"a": NaN}', "NaN")):
        file.write_text(content)
        with pytest.raises(InputError, match=f"config.json is .*{says}"):
            read_json(file)
    monkeypatch.setattr(documents, "MAX_BYTES", 10)
    file.write_text(json.dumps({"a": "long enough"}))
    with pytest.raises(InputError, match="too large"):
        read_json(file)
    for other in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="is not a file"):
            read_json(other)


BAD_YAML = {
    b"!!int x": "does not fit its type",
    b"!!float x": "does not fit its type",
    b"!!bool x": "does not fit its type",
    b"!!timestamp x": "does not fit its type",
    b"2001-13-45": "does not fit its type",
    b"!!python/object/apply:os.system [true]": "could not determine a constructor",
    b"x: .nan": "not finite",
    b"'a\0b'": "special characters",
    b"\xff\xfe\xff": "not UTF-8",
    b"&a [*a]": "nested more than 64 deep",
    DEEP.encode(): "nested more than 64 deep",
    BOMB.encode(): "too large",
    b"a: 1\na: 2": "the key 'a' stands twice",
    b"a: [1,\nb: 2": "line 2",
    b"x: [" + b"1, " * 100_000 + b"1]": "too large",
}


@pytest.mark.parametrize("content", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_that_is_refused(content: bytes) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_yaml(content)
    assert BAD_YAML[content] in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_that_is_read() -> None:
    """An anchor that is used a few times is no bomb."""
    assert parse_yaml(b"a: &a [1, 2]\nb: *a\nc: *a") == {"a": [1, 2], "b": [1, 2], "c": [1, 2]}
    assert parse_yaml(b"") is None


@dataclass(frozen=True)
class Inner:
    """A row that checks itself."""

    count: int
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("fewer than none")


@dataclass(frozen=True)
class Outer:
    """Rows of another class."""

    rows: tuple[Inner, ...]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "missing required field `rows`"),
        ({"rows": "x"}, r"it.rows: Expected `array`"),
        ({"rows": [{"count": 1.5}]}, r"it.rows\[0\].count: Expected `int`, got `float`"),
        ({"rows": [{"count": True}]}, "got `bool`"),
        ({"rows": [{"count": 1, "share": "1"}]}, "share: Expected `float`"),
        ({"rows": [{"count": 1, "share": 10**400}]}, "out of range"),
        ({"rows": [{"count": -1}]}, r"it.rows\[0\]: fewer than none"),
    ],
)
def test_typed_says_where(value: object, says: str) -> None:
    with pytest.raises(DocumentError, match=says):
        typed(Outer, value)


def test_typed_ignores_keys_that_it_does_not_know() -> None:
    assert typed(Outer, {"rows": [{"count": 1, "share": 2, "more": None}], "x": 1}) == Outer((Inner(1, 2.0),))


def test_what_a_message_repeats() -> None:
    """In one line, short, and nothing that steers a terminal."""
    assert short_line("a\nb\t\x1b[31m\ud800é") == r"a b \x1b[31m\ud800é"
    assert len(short_line("x" * 10_000)) < 500 and len(shown("x" * 10_000)) < 130
