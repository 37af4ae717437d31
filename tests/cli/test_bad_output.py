"""Outputs that cannot be written end in one line; what is there stays untouched."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline import files, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.own_text import kept
from patience import HUNG
from refusal import COMMANDS, Copy, Refused, check_refusal, command
from tokenizers import Tokenizer
from tokenizers.models import BPE


@pytest.mark.parametrize("verb", COMMANDS)
def test_output_occupied(verb: str, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """Files that edgepress did not write survive."""
    out = tmp_path / "out"
    target = out / "01-prune" if verb == "build" else out
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    refused(*command(verb, tiny, out), says=("did not write", "choose another output folder"))


def test_manifest_of_something_else(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A web app has a manifest.json as well: that alone does not make a folder ours to replace."""
    out = tmp_path / "webapp"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "My app", "start_url": "/"}')
    (out / "thesis.txt").write_text("years of work")
    refused(*command("quantize", tiny, out), says=("not", "choose another output folder"))


@pytest.mark.parametrize("verb", ["quantize", "build"])
@pytest.mark.parametrize("place", ["file", "file/out"])
def test_output_at_or_below_a_file(place: str, verb: str, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A file is never replaced by a folder."""
    (tmp_path / "file").write_text("kept")
    refused(*command(verb, tiny, tmp_path / place), says=("file", "choose another output folder"))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("verb", COMMANDS)
def test_output_cannot_be_made(verb: str, refused: Refused, tiny: Path) -> None:
    """/proc takes no folders, not even root's."""
    refused(*command(verb, tiny, "/proc/edgepress-out"), says=("/proc", "choose another output folder"))
    refused(*command(verb, tiny, "/proc/no/edgepress-out"), says=("cannot write to /proc/no", "choose another output folder"))


def test_output_without_permission(refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before the work, not found out after it."""
    monkeypatch.setattr(files.os, "access", lambda *_, **__: False)
    refused(*command("quantize", tiny, tmp_path / "out"), says=("no permission", "choose another output folder"))


def test_a_finished_build_on_a_read_only_disk_is_shown(
    call: Callable[..., Any], refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is to be written, so nothing need be writable; with another option there is."""
    (tmp_path / "recipe.yaml").write_text("quantize: {method: rtn}")
    line = ["build", tiny, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml"]
    first = call(*line)
    monkeypatch.setattr(files.os, "access", lambda *_, **__: False)
    again = call(*line)
    assert again.code == 0 and again.out == first.out and "already done, kept" in again.err
    refused(*line, "--bits", 8, says=("no permission", "choose another output folder"))


@pytest.mark.parametrize("verb", [*COMMANDS, "sensitivity"])
@pytest.mark.parametrize("place", ["loop", "loop/out"])
def test_output_is_a_link_to_itself(place: str, verb: str, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """What Python makes of one differs between its versions."""
    (tmp_path / "loop").symlink_to("loop")
    line = command(verb, tiny, tmp_path / place) if verb in COMMANDS else [verb, tiny, "--out", tmp_path / place]
    refused(*line, says=("a link that leads back to itself", "give another path"))


def test_output_name_too_long(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """An error of the file system is a user's error too."""
    refused(*command("quantize", tiny, tmp_path / ("x" * 300)), says=("too long", "choose another output folder"))


def test_output_here(call: Callable[..., Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OUT may be the empty folder one stands in: it is written, or refused in one line, and nothing is left beside the files."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = call(*command("quantize", tiny, "."))
    if result.code:
        check_refusal(result.code, result.err, ("choose another output folder",))
    assert sorted(tmp_path.iterdir()) == [here] and not [p for p in here.iterdir() if p.name.startswith(".")]


def test_output_is_the_source(refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """A stage that replaced what it reads would lose it when it fails."""
    assert call(*COMMANDS["prune"][:1], tiny, tmp_path / "pruned", "--remove-count", 1, "--calibration-tokens", 64).code == 0
    says = (" is the source ", "only read", "choose another output folder")
    refused(*command("quantize", tmp_path / "pruned", tmp_path / "pruned"), says=says)
    (tmp_path / "again").symlink_to("pruned")
    refused(*command("quantize", tmp_path / "pruned", tmp_path / "again"), says=says)


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("place", ["model", "link", "out/../model", "link/onnx/.."])
def test_output_is_the_source_by_another_name(
    place: str, verb: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's folder is read, however it is called, and nothing is put beside its files."""
    source = copy_of(tiny)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "out").mkdir()
    (source / "onnx").mkdir()
    for given in (source, tmp_path / "link"):
        refused(*command(verb, given, tmp_path / place), says=(f"{place} is the source", "choose another output folder"))
    monkeypatch.chdir(source)
    refused(*command(verb, ".", "../model"), says=("model is the source .", "choose another output folder"))


def test_folders_in_the_source(
    refused: Refused, call: Callable[..., Any], copy_of: Copy, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default OUT of ``build .``, and those of single stages; what is done there is kept the next time."""
    source = copy_of(tiny)
    size = files.folder_bytes(source)
    (tmp_path / "recipe.yaml").write_text("quantize: {method: rtn}")
    monkeypatch.chdir(source)
    for state in ("done in", "already done, kept"):
        result = call("build", ".", "--recipe", "../recipe.yaml")
        assert result.code == 0 and state in result.err, result.err
    assert (source / "out" / "model" / "01-quantize" / "manifest.json").is_file()
    assert files.folder_bytes(source) == size
    assert call("quantize", source, source / "packed", "--method", "rtn").code == 0
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"another's")
    for verb in COMMANDS:
        refused(*command(verb, source, source / "onnx"), says=("onnx lies in the source", "did not write", "choose another"))


def test_another_folder_that_is_read(refused: Refused, call: Callable[..., Any], copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """It is named, and not called the source."""
    teacher = copy_of(tiny, "teacher")
    refused("heal", tiny, teacher, "--original", teacher, says=f"{teacher} is {teacher}, which is only read")


def test_figures_beside_the_source(
    refused: Refused, call: Callable[..., Any], copy_of: Copy, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of ``sensitivity .``: no file of the model, so it makes no other one, and may be written again."""
    source = copy_of(tiny)
    before, text = Artifact.load(source).identity(), kept._key(source, 64, 0)
    monkeypatch.chdir(source)
    for _ in range(2):
        result = call("sensitivity", ".", "--calibration-tokens", 256)
        assert result.code == 0 and (source / "sensitivity.json").is_file(), result.err
    assert Artifact.load(source).identity() == before and kept._key(source, 64, 0) == text
    assert call(*command("quantize", source, tmp_path / "out")).code == 0
    assert not (tmp_path / "out" / "sensitivity.json").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "README.md", "processor_config.json", "model.safetensors.index.json", "sub/a.json"]
)
def test_figures_in_place_of_a_file_of_the_source(name: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Those that are there, whoever wrote them, and those that would be read as the model's."""
    source = copy_of(tiny)
    (source / "README.md").write_text("mine")
    (source / "sub").mkdir()
    (source / "sub" / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to(source / name)
    for out in (source / name, tmp_path / "link"):
        refused("sensitivity", source, "--out", out, says=("a file of the model in", "give --out another name"))


def test_output_in_the_cache_of_the_hub(refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Beside the snapshot that is read: the folder is the hub's."""
    root = tmp_path / "models--me--tiny"
    (root / "snapshots").mkdir(parents=True)
    copy_of(tiny).rename(root / "snapshots" / "abc")
    refused(*command("build", root, root / "out"), says=("out lies in the hub's cache", "choose another output folder"))
    refused(*command("quantize", root, root / "snapshots" / "abc" / "out"), says="out lies in the hub's cache")
    refused("sensitivity", root, "--out", root / "snapshots" / "abc" / "s.json", says=("lies in the hub's cache", "give --out"))


def test_a_build_around_its_source(refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """SRC may be a stage in OUT, and what it would be overwritten by is found before a stage runs."""
    pruned = tmp_path / "build" / "02-quantize"
    assert call(*COMMANDS["prune"][:1], tiny, pruned, "--remove-count", 1, "--calibration-tokens", 64).code == 0
    (tmp_path / "recipe.yaml").write_text("prune: {remove_count: 1}\nquantize: {method: rtn}")
    line = ["build", pruned, tmp_path / "build", "--calibration-tokens", 64, "--recipe", tmp_path / "recipe.yaml"]
    refused(*line, says=("02-quantize is the source", "choose another output folder"))
    (tmp_path / "recipe.yaml").write_text("quantize: {method: rtn}")
    assert call(*line).code == 0
    assert sorted(p.name for p in (tmp_path / "build").iterdir() if p.is_dir()) == ["01-quantize", "02-quantize"]


@pytest.mark.parametrize("inside", ["source", "thesis.txt"])
def test_own_folder_that_holds_more(inside: str, refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """To replace a folder of ours is to delete it: not with the source, or a user's file, inside."""
    out = tmp_path / "out"
    assert call(*command("quantize", tiny, out)).code == 0
    shutil.copytree(tiny, out / "source") if inside == "source" else (out / inside).write_text("years of work")
    source = out / "source" if inside == "source" else tiny
    refused(*command("quantize", source, out), "--bits", 8, says=("choose another output folder",))


@pytest.mark.parametrize("verb", COMMANDS)
def test_too_little_disk(verb: str, refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the first byte is written."""
    usage = shutil._ntuple_diskusage(1 << 40, (1 << 40) - 1024, 1024)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    refused(
        *command(verb, tiny, tmp_path / "out"),
        says=("not enough disk space", str(tmp_path), " MB needed, 1.0 kB free", "free some"),
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("named", [True, False])
def test_disk_full_half_way(
    code: int, named: bool, refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was estimated may still not be there when it is needed."""

    def fail(source: object, folder: Path, options: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(code, os.strerror(code), *([str(folder / "model.safetensors")] if named else []))

    monkeypatch.setattr(stages, "load", lambda _: fail)
    refused(*command("quantize", tiny, tmp_path / "out"), says=(os.strerror(code), "choose another output folder"))


@pytest.mark.parametrize("verb", ["prune", "quantize", "export"])
def test_files_may_not_grow(verb: str, refused: Refused, copy_of: Copy, tiny: Path, text: Path, tmp_path: Path) -> None:
    """A real failure of write(2), through whatever library writes: the system refuses files above 30 kB."""
    source = copy_of(tiny)
    if verb == "quantize":
        Tokenizer(BPE(vocab={"a": 0}, merges=[])).save(
            str(source / "tokenizer.json")
        )  # else copying it fails first, and the weights' own writer is not reached
    flags = {"prune": ["--calibration", text], "export": ["--text", text]}.get(verb, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        refused(*command(verb, source, tmp_path / "out"), *flags, says=("cannot write", "output folder"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_may_not_grow_in_a_process_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """The same with nothing of pytest around: what the interpreter prints when it goes counts as well."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(part) for part in command("prune", tiny, tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HUNG)
    check_refusal(done.returncode, done.stderr, ("too large", "choose another output folder"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".out.partial", ".out.former"])
@pytest.mark.parametrize("leftover", ["a file", "a link", "a dead link"])
def test_something_else_in_the_place_of_a_leftover(
    leftover: str, name: str, call: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    """It is removed, and never what a link leads to."""
    precious, place = tmp_path / "precious", tmp_path / name
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    if leftover == "a file":
        place.write_text("x")
    else:
        place.symlink_to("precious" if leftover == "a link" else "nothing")
    assert call(*command("quantize", tiny, tmp_path / "out")).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"] and (precious / "thesis.txt").is_file()


def test_build_into_an_artifact(refused: Refused, call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """Its stages would lie in a folder that is complete without them."""
    assert call(*command("quantize", tiny, tmp_path / "out")).code == 0
    refused(*command("build", tiny, tmp_path / "out"), says=("not a build", "choose another output folder"))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The disk fills up half-way: what was there stays."""
    file = tmp_path / "job.json"
    files.write_json(file, {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            files.write_json(file, {"a": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.read_json(file) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["job.json"]


def test_the_folder_of_a_build_is_no_output_of_a_stage(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """What lies in it is ours, and stays."""
    (stage := tmp_path / "out" / "04-export").mkdir(parents=True)
    (stage / "manifest.json").write_text("{}")
    says = ("is the folder of a build, with 04-export in it", "choose another output folder")
    refused(*command("quantize", tiny, tmp_path / "out"), says=says)


def test_a_report_into_a_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "docs" / "example"
    refused("report", example, "--out", tmp_path / "nowhere" / "report.md", says=("no such folder", "nowhere", "give another"))
