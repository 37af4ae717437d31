"""Text files as people have them: each is read as what it is, or refused, and never as prose with braces and quotes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import TextError
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions, SensitivityOptions
from edgepress.pipeline.quantize.choose import choose
from edgepress.pipeline.quantize.plan import plan
from edgepress.pipeline.quantize.sensitivity import measure
from edgepress.pipeline.text.reading import read_text

ROWS = ["One morning, she said: 'No.'", "The café was closed\nuntil noon."]
PROSE = "\n\n".join(ROWS)


def lines(make: Callable[[str], object]) -> str:
    return "\n".join(json.dumps(make(row)) for row in ROWS) + "\n"


def chat(row: str) -> object:
    first, rest = row[:5], row[5:]
    return {"id": 1, "messages": [{"role": "user", "content": first}, {"role": "assistant", "content": rest}]}


TABLE = "id,text\n" + "".join(f'{n},"{row}"\n' for n, row in enumerate(ROWS))
READ: dict[str, tuple[str, bytes, str, str]] = {  # name, content, key, text
    "prose": ("a.txt", PROSE.encode(), "text", PROSE),
    "Windows' line ends": ("a.txt", PROSE.replace("\n", "\r\n").encode(), "text", PROSE),
    "byte-order mark": ("a.txt", b"\xef\xbb\xbf" + PROSE.encode(), "text", PROSE),
    "UTF-16": ("a.txt", PROSE.encode("utf-16"), "text", PROSE),
    "prose that begins with a bracket": ("a.txt", b"[1] He said {so}.", "text", "[1] He said {so}."),
    "lines": ("a.jsonl", lines(lambda row: {"text": row}).encode(), "text", PROSE),
    "lines in capitals": ("A.JSONL", lines(lambda row: {"text": row}).encode(), "text", PROSE),
    "lines with a mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(lambda row: {"text": row}).encode(), "text", PROSE),
    "lines without a name": ("a.txt", lines(lambda row: {"text": row}).encode(), "text", PROSE),
    "lines in an array's name": ("a.json", lines(lambda row: {"text": row}).encode(), "text", PROSE),
    "line separator in a text": ("a.jsonl", '{"text": "one\u2028two"}\n'.encode(), "text", "one\u2028two"),
    "array": ("a.json", json.dumps([{"text": row} for row in ROWS], indent=1).encode(), "text", PROSE),
    "array without a name": ("a", json.dumps([{"text": row} for row in ROWS], indent=1).encode(), "text", PROSE),
    "one object over many lines": ("a.json", json.dumps({"text": PROSE}, indent=1).encode(), "text", PROSE),
    "another key": ("a.jsonl", lines(lambda row: {"content": row, "text": 3}).encode(), "content", PROSE),
    "messages": ("a.jsonl", lines(chat).encode(), "messages", "\n\n".join(f"{row[:5]}\n\n{row[5:]}" for row in ROWS)),
    "ShareGPT": ("a.json", b'[{"conversations": [{"from": "human", "value": "Yes?"}]}]', "conversations", "Yes?"),
    "table": ("a.csv", TABLE.encode(), "text", PROSE),
    "table with tabs": ("a.TSV", "text\tid\nOne.\t1\nTwo.\t2\n".encode("utf-16"), "text", "One.\n\nTwo."),
    "a long field": ("a.csv", b'text\n"' + b"x" * 200_000 + b'"\n', "text", "x" * 200_000),
    "half a character": ("a.jsonl", b'{"text": "a\\ud83d"}\n{"text": "\\ude00b"}', "text", "a\ufffd\n\n\ufffdb"),
    "both halves": ("a.jsonl", b'{"text": "a\\ud83d\\ude00"}\n', "text", "a\U0001f600"),
    "blank rows": ("a.jsonl", b'{"text": " "}\n\n{"text": "One."}\n', "text", "One."),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path) -> None:
    name, content, key, text = READ[case]
    (tmp_path / name).write_bytes(content)
    assert read_text(tmp_path / name, key) == text


REFUSED: dict[str, tuple[str, bytes, str, str]] = {  # name, content, key, what the error says
    "Latin-1": ("a.txt", PROSE.encode("latin-1"), "text", r"not UTF-8 text \(line 3\).*iconv"),
    "UTF-16 without a mark": ("a.jsonl", PROSE.encode("utf-16-le"), "text", "line 1 has NUL"),
    "another key": ("a.jsonl", lines(chat).encode(), "text", "line 1: no 'text' field; it has id, messages; .*--text-key"),
    "many keys": ("a.jsonl", json.dumps({f"k{n}": 1 for n in range(9)}).encode(), "text", r"k5, \.\.\.; "),
    "later row": ("a.jsonl", b'{"text": "One."}\n\n{"txt": "Two."}\n', "text", "line 3: no 'text' field; it has txt"),
    "no text": ("a.jsonl", b'{"text": null}\n', "text", "line 1: the 'text' field is null"),
    "no messages": ("a.jsonl", b'{"text": [1, 2]}\n', "text", "a list of something else"),
    "pictures": ("a.json", b'[{"m": [{"content": [{"type": "image"}]}]}]', "m", "row 1: .*a list of something else"),
    "no object": ("a.jsonl", b'"One."\n', "text", "line 1: not a JSON object"),
    "half a line": ("a.jsonl", b'{"text": "One."}\n{"text": "Tw', "text", "line 2: not valid JSON"),
    "half an array": ("a.json", b'[{"text": "One."},', "text", "the array: not valid JSON"),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "text", "line 1: not valid JSON"),
    "table": ("a.csv", b'text\n"One', "text", "line 1: not valid CSV"),
    "short row": ("a.csv", b"id,text\n1\n", "text", "line 2: the 'text' field is null"),
    "zip": ("a.txt", b"PK\x03\x04", "text", r"compressed \(zip\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    """One line, with the file, the line in it, and the keys found."""
    name, content, key, says = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=says) as refusal:
        read_text(tmp_path / name, key)
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("loss", "vocabulary", "said"),
    [(5, 512, False), (5.6, 512, True), (6.9, 50_000, False), (7, 50_000, True), (math.nan, 9, True)],
)
def test_beyond_reason(loss: float, vocabulary: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Above half of the vocabulary, or a thousand, whichever is less; NaN too."""
    warn_unless_readable(loss, vocabulary, Path("a.txt"))
    assert ("cannot read a.txt" in caplog.text) == said


def _gptq(source: Path, out: Path, text: Path) -> None:
    checkpoint = Checkpoint(source)
    plan(checkpoint, checkpoint.meta_model(), QuantizeOptions(calibration=text, text_key="content"), out)[0].windows()


STAGES: dict[str, Callable[[Path, Path, Path], object]] = {
    "prune": lambda source, out, text: stages.run(
        "prune",
        Artifact.load(source),
        out,
        PruneOptions(remove_layers=(2,), calibration=text, text_key="content", calibration_tokens=256),
    ),
    "gptq": _gptq,
    "the choice of bits": lambda source, out, text: choose(
        Artifact.load(source), QuantizeOptions(max_growth=9, calibration=text, text_key="content")
    ),
    "sensitivity": lambda source, out, text: measure(
        Checkpoint(source), SensitivityOptions(calibration=text, text_key="content", calibration_tokens=64)
    ),
    "export": lambda source, out, text: stages.run(
        "export", Artifact.load(source), out, ExportOptions(text=text, text_key="content")
    ),
}


_SLOW = ("the choice of bits", "export", "sensitivity")


@pytest.mark.parametrize("stage", [pytest.param(name, marks=pytest.mark.families) if name in _SLOW else name for name in STAGES])
def test_a_text_that_the_model_cannot_read_is_said(
    stage: str, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Chinese for a model of English; nothing of its own language."""
    chinese = tmp_path / "chinese.json"
    chinese.write_text(json.dumps([{"content": "雨在早晨之前就停了。女孩走到河边。" * 300}]))
    STAGES[stage](reference, tmp_path / "one", chinese)
    assert f"warning: the model cannot read {chinese}" in caplog.text
    caplog.clear()
    STAGES[stage](reference, tmp_path / "two", CALIBRATION_TEXT)
    assert "cannot read" not in caplog.text
