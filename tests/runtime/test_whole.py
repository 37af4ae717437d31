"""What is run is what was written: files are hashed once, and again after a change that leaves size and time alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.options import ExportOptions
from edgepress.pipeline.runtime import whole
from edgepress.pipeline.runtime.whole import check_whole
from refusal import check_refusal


@pytest.fixture(scope="module")
def exported(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "onnx"
    return stages.run("export", Artifact.load(tiny), out, ExportOptions(text=text, accuracy_level="0")).path


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and a cache of its own, that trusts files from their first second on."""
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(whole, "CLOCK_SECONDS", -60.0)
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to the end."""
    names: list[str] = []
    real = whole.sha256
    monkeypatch.setattr(whole, "sha256", lambda file: names.append(file.name) or real(file))
    return names


def flip(file: Path) -> None:
    """One bit, and the times as they were."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_a_spoiled_file_is_not_run(name: str, call: Callable[..., Any], folder: Path) -> None:
    """Also where it was whole at an earlier start; and a file that is gone."""
    assert call("run", folder, "Once", "--max-new-tokens", 2).code == 0
    flip(folder / name)
    for _ in range(2):
        result = call("run", folder, "Once", "--max-new-tokens", 2)
        check_refusal(result.code, result.err, (name, "differs from the manifest", "export again"))
        assert not result.out
    (folder / name).unlink()
    result = call("run", folder, "Once", "--max-new-tokens", 2)
    check_refusal(result.code, result.err, (name,))


def test_second_start_reads_nothing(folder: Path, hashed: list[str]) -> None:
    check_whole(folder)
    assert sorted(hashed) == sorted(Artifact.load(folder).files)
    hashed.clear()
    check_whole(folder)
    assert hashed == []
    flip(folder / "model.onnx.data")
    with pytest.raises(InputError, match=r"model\.onnx\.data"):
        check_whole(folder)
    assert hashed == ["model.onnx.data"]


def test_a_change_just_now_may_be_followed_by_another(folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same time: nothing is taken as known that soon."""
    monkeypatch.setattr(whole, "CLOCK_SECONDS", 60.0)
    check_whole(folder)
    hashed.clear()
    check_whole(folder)
    assert "model.onnx.data" in hashed


def test_text_may_be_edited(call: Callable[..., Any], folder: Path) -> None:
    """With a word, for nothing else tells it from damage."""
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + "\n")
    result = call("run", folder, "Once", "--max-new-tokens", 2)
    assert result.code == 0 and "tokenizer_config.json differs from the manifest" in result.err
    (folder / "manifest.json").unlink()
    result = call("run", folder, "Once", "--max-new-tokens", 2)
    assert result.code == 0 and "no manifest.json" in result.err


@pytest.mark.parametrize("broken", ["", "[]", "{", "[" * 100_000, '{"x": 5}', "a folder", "no place"])
def test_a_broken_cache_is_no_cache(broken: str, folder: Path, hashed: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "checked.json"
    if broken == "no place":
        (tmp_path / "cache").write_text("a file")
    elif broken == "a folder":
        cache.mkdir(parents=True)
    else:
        cache.parent.mkdir()
        cache.write_text(broken)
    check_whole(folder)
    assert hashed


def test_forgets_what_is_gone(folder: Path, exported: Path, tmp_path: Path) -> None:
    check_whole(folder)
    shutil.rmtree(folder)
    check_whole(exported)
    assert str(folder) not in (tmp_path / "cache" / "checked.json").read_text()
