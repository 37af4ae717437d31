"""Nothing that a stranger wrote steers the terminal or a report: names, manifests, a model's own words."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline.cli.terminal import log_to_terminal, plain_output, say
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.report import model
from edgepress.pipeline.report.files import save
from edgepress.pipeline.visible import one_line, plain_progress, plain_text
from refusal import Refused

STEERING = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
HOSTILE = "a\x1b]52;c;ZXZpbA==\x07\x1b[2J\u202egnp.exe\u2066\x9b1A\r"
MARKUP = "<img src=x onerror=alert(1)>|`x`[y](javascript:z)$\\frac{$"


def test_characters_that_steer() -> None:
    """Whatever of them a text has, none comes through; every other character does."""
    for show in (one_line, plain_text):
        assert not set(show(STEERING)) & set(STEERING)
    assert not set(plain_progress(STEERING)) & (set(STEERING) - {"\r"})
    assert plain_progress("\r 10 %\x1b[A\x1b[2J") == "\r 10 %\x1b[A\\x1b[2J"  # bars of tqdm are drawn with the first two
    assert one_line("two\nlines\u2028") == "two\\nlines\\u2028"
    for harmless in ("Grüße, Zoë\t日本　語\n", "سلام\u200c\u200f دنیا", "👩\u200d🚀 🏴󠁧󠁢󠁥󠁮󠁧󠁿"):
        assert plain_text(harmless) == harmless
    assert plain_text("one\r\ntwo") == "one\ntwo"
    (out := one_line("\udcff name")).encode()
    assert out == "\\udcff name"


def test_streams_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """print, the log and single lines of an error, and what a library writes on its own."""
    with plain_output():
        log_to_terminal()
        print(HOSTILE)
        sys.stderr.write(f"library: {HOSTILE}\n")
        logging.getLogger("edgepress").info("log: %s\nprune: done", HOSTILE)
        say(f"error: {HOSTILE}\nok")
        assert sys.stdout.encoding and sys.stdout.isatty() is False
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1 and shown.err.count("\n") == 3
    assert not set(shown.out + shown.err.replace("\r\n", "\n")) & set(STEERING.replace("\r", ""))


def test_show_of_a_hostile_manifest(call: Callable[..., Any], copy_of: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    assert call("quantize", tiny, tmp_path / "out", "--method", "rtn").code == 0
    manifest = read_json(tmp_path / "out" / "manifest.json")
    step = manifest["steps"][0]
    step["versions"], step["options"] = {HOSTILE + "\n9. export": HOSTILE}, {HOSTILE: HOSTILE}
    write_json(tmp_path / "out" / "manifest.json", manifest)
    result = call("show", tmp_path / "out")
    assert result.code == 0 and not set(result.out) & set(STEERING)
    assert "\n9. export" not in result.out
    step["stage"] = HOSTILE + "\n9. export"
    write_json(tmp_path / "out" / "manifest.json", manifest)
    result = call("show", tmp_path / "out")
    assert result.code == 2 and not set(result.err) & set(STEERING) and result.err.count("\n") == 1


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../secret", "name\x1b[2J", "two\nlines"])
def test_names_of_a_manifest_stay_inside(name: str, refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """The files that it names are read to compare them with their sha256: none outside of its folder."""
    assert call("quantize", tiny, tmp_path / "out", "--method", "rtn").code == 0
    manifest = read_json(tmp_path / "out" / "manifest.json")
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    write_json(tmp_path / "out" / "manifest.json", manifest)
    for command in (["show", tmp_path / "out"], ["export", tmp_path / "out", tmp_path / "onnx"]):
        refused(*command, says=("no name of a file in its folder", "build it again"))


def test_links_of_an_artifact_stay_inside(refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    assert call("quantize", tiny, tmp_path / "out", "--method", "rtn").code == 0
    shutil.move(tmp_path / "out" / "packed.safetensors", tmp_path / "elsewhere")
    (tmp_path / "out" / "packed.safetensors").symlink_to("../elsewhere")
    refused("show", tmp_path / "out", says=("packed.safetensors is a link", "cp -rL"))


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_a_hostile_report(suffix: str, tmp_path: Path) -> None:
    """Names come from folders and manifests: none is markup, a further cell or a line of its own."""
    example = Path(__file__).parent.parent / "docs" / "example" / "report.json"
    text = example.read_text()
    name = json.loads(text)["artifact"]
    content = json.loads(text.replace(f'"{name}"', json.dumps(HOSTILE + MARKUP + "\n# heading")))
    content["environment"]["command"] += HOSTILE + "\n# heading"
    content["missing"] = {HOSTILE: MARKUP}
    write_json(tmp_path / "report.json", content)
    save(model.read(tmp_path / "report.json"), tmp_path / f"out{suffix}")
    page = (tmp_path / f"out{suffix}").read_text()
    assert not set(page) & set(STEERING) and "\n# heading" not in page
    assert "frac" in page and "]52;c" in page  # it is shown, as text
    assert not re.search(r"(?<!\\)<img", page)
    if suffix == ".md":
        assert r"\|\`x\`\[y\](javascript" in page
