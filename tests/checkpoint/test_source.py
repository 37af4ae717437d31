"""What people give as SRC."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.pipeline.artifact import onnx_folder
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.source import resolve
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.recipe import default_out
from transformers import AutoModelForCausalLM


@pytest.fixture
def cache(tiny: Path, tmp_path: Path) -> Path:
    """A model in the hub's cache: files are links to blobs, refs/main names the snapshot."""
    root = tmp_path / "models--me--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "snapshots" / "0123abc").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123abc\n")
    for number, file in enumerate(sorted(tiny.iterdir())):
        shutil.copy(file, root / "blobs" / f"b{number}")
        (root / "snapshots" / "0123abc" / file.name).symlink_to(f"../../blobs/b{number}")
    return root


def test_a_model_in_the_cache_of_the_hub(cache: Path) -> None:
    """By its folder, by the folder of its snapshots, by the snapshot: what transformers loads from the last."""
    snapshot = cache / "snapshots" / "0123abc"
    for given in (cache, cache / "snapshots", snapshot):
        assert resolve(str(given)) == snapshot
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()(ids).logits
        assert torch.equal(load_model(resolve(str(cache)))(ids).logits, theirs)


def test_which_snapshot(cache: Path) -> None:
    """That of refs/main, else the only one; among several the user must choose, and no name leads out of the folder."""
    (cache / "snapshots" / "4567def").mkdir()
    assert resolve(str(cache)).name == "0123abc"
    for name in ("gone", "../refs", ""):
        (cache / "refs" / "main").write_text(name)
        with pytest.raises(InputError, match=r"2 snapshots and no refs/main; give one of .*: 0123abc, 4567def"):
            resolve(str(cache))
    shutil.rmtree(cache / "refs")
    (cache / "snapshots" / "4567def").rmdir()
    assert resolve(str(cache)).name == "0123abc"
    shutil.rmtree(cache / "snapshots" / "0123abc")
    with pytest.raises(InputError, match="without a snapshot"):
        resolve(str(cache))


def test_home_links_and_files(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` where no shell resolved it, a link to a folder, and a file for its folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(cache / "snapshots" / "0123abc")
    assert resolve("~/link") == tmp_path / "link"
    with pytest.raises(InputError, match=r"config.json is a file; give its folder, .*link"):
        resolve(str(tmp_path / "link" / "config.json"))
    with pytest.raises(InputError, match="no such folder: ~nobody-here/x"):
        resolve("~nobody-here/x")
    (tmp_path / "model.onnx").touch()
    assert onnx_folder(tmp_path / "model.onnx") == onnx_folder(tmp_path) == tmp_path


def test_folders_of_other_weights(tiny: Path, copy_of: Callable[..., Path]) -> None:
    """GGUF files are named; an adapter's base is named in a command only if it can be nothing but a name."""
    source = copy_of(tiny)
    (source / "model.safetensors").rename(source / "model-q4.gguf")
    with pytest.raises(InputError, match=r"GGUF files; give the file itself: .*model-q4.gguf"):
        resolve(str(source))
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "x\'); import os; (\'"}')
    with pytest.raises(ModelError, match=r"M.from_pretrained\('BASE'\), '.*model'\)"):
        resolve(str(source))


def test_every_stage_refuses_an_adapter(tiny: Path, copy_of: Callable[..., Path]) -> None:
    """Also where a folder comes by another way than its name: transformers would load it into the model."""
    source = copy_of(tiny)
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="a model and an adapter that changes it"):
        check_checkpoint(source, trust_remote_code=False)


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named after the source, also where that is the current folder or the one above."""
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "sub")
    names = {"me/tiny": "tiny", "../../models/a/": "a", ".": "sub", "..": "mine", "reference": "reference"}
    assert {source: default_out(source) for source in names} == {source: Path("out") / name for source, name in names.items()}


def test_a_gguf_file_that_is_not_there_yet(tmp_path: Path) -> None:
    """A pointer of git-LFS, or a pipe: named, and never waited for."""
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(ModelError, match=r"a\.gguf is a git-LFS pointer.*; run 'git lfs pull'"):
        resolve(str(tmp_path / "a.gguf"))
    os.mkfifo(tmp_path / "b.gguf")
    with pytest.raises(InputError, match=r"b\.gguf is not a file"):
        resolve(str(tmp_path / "b.gguf"))
