"""Packed folders and artifacts that cannot be used end in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from edgepress.pipeline.cli import commands as cli
from edgepress.pipeline.files import sha256
from refusal import Copy, Refused, no_longer_than, truncated_to, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed/ (rtn, 4 bits) and onnx/ of the tiny model."""
    folder = tmp_path_factory.mktemp("bad")
    assert cli.main(["quantize", str(tiny), str(folder / "packed"), "--method", "rtn"]) == 0
    assert cli.main(["export", str(folder / "packed"), str(folder / "onnx"), "--text", str(text)]) == 0
    return folder


WRONG_FORMAT = [
    ("prune packed OUT --remove-layers 1", "packed"),
    ("quantize packed OUT --method rtn", "packed"),
    ("quantize onnx OUT --method rtn", "onnx"),
    ("export onnx OUT", "onnx"),
    ("bench packed --out OUT", "no model.onnx"),
    ("run packed Once", "no model.onnx"),
]


@pytest.mark.parametrize(("line", "says"), WRONG_FORMAT, ids=[line for line, _ in WRONG_FORMAT])
def test_wrong_kind_of_folder(line: str, says: str, refused: Refused, made: Path, tmp_path: Path) -> None:
    """The stages have an order: the line says which folder to give instead."""
    places = {"packed": made / "packed", "onnx": made / "onnx", "OUT": tmp_path / "out"}
    refused(*(places.get(part, part) for part in line.split()), says=says)


def test_damaged_packed_file(refused: Refused, made: Path, text: Path, tmp_path: Path) -> None:
    """Cut short after it was written, the codes are not guessed."""
    shutil.copytree(made / "packed", tmp_path / "packed")
    truncated_to(1000)(tmp_path / "packed" / "packed.safetensors")
    refused("export", tmp_path / "packed", tmp_path / "out", "--text", text, says=("packed.safetensors", "build that folder again"))


ENDLESS = {
    "manifest.json": ("show", "ONNX"),
    "genai_config.json": ("run", "ONNX", "Once"),
    "tokenizer.json": ("run", "ONNX", "Once"),
    "tokenizer_config.json": ("run", "ONNX", "Once"),
    "chat_template.jinja": ("run", "ONNX", "Once", "--chat"),
    "model.onnx": ("run", "ONNX", "Once"),
    "report.json": ("report", "ONNX"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_without_end(name: str, refused: Refused, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx" / "manifest.json").unlink()  # or its sha256 would meet everything
    (tmp_path / "onnx" / name).touch()
    os.truncate(tmp_path / "onnx" / name, 1 << 40)
    with no_longer_than(20):
        refused(*(str(tmp_path / "onnx") if part == "ONNX" else part for part in ENDLESS[name]), says=(name, "too large"))


ARTIFACTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "graph is none": (write("model.onnx", b"nothing of the kind"), "model.onnx"),
    "weights missing": (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx"),
    "weights cut": (lambda folder: os.truncate(folder / "model.onnx.data", 1000), "model.onnx"),
    "no GenAI config": (lambda folder: (folder / "genai_config.json").unlink(), "genai_config.json"),
    "GenAI config is no JSON": (write("genai_config.json", b"{"), "genai_config.json"),
    "GenAI config says nothing": (write("genai_config.json", b"{}"), "genai_config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), "tokenizer.json"),
    "GenAI config of the wrong types": (write("genai_config.json", b'{"model": {"context_length": "256"}}'), "context_length"),
    "GenAI config is nested": (write("genai_config.json", b"[" * 3000 + b"]" * 3000), "nested more than 64 deep"),
    "end tokens are lists": (write("generation_config.json", b'{"eos_token_id": [[1]]}'), "eos_token_id is [1]"),
    "a graph with a length that is none": (
        lambda folder: with_metadata(folder / "model.onnx", "edgepress.rotary_switches", "x"),
        "is not a graph that edgepress wrote",
    ),
    "a graph without logits_to_keep": (
        lambda folder: without_input(folder / "model.onnx", "logits_to_keep"),
        "has no logits_to_keep",
    ),
}


def with_metadata(file: Path, key: str, value: str) -> None:
    model = onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(model, {prop.key: prop.value for prop in model.metadata_props} | {key: value})
    file.write_bytes(model.SerializeToString())
    (file.parent / "manifest.json").unlink()  # or it would be refused for its sha256


def without_input(file: Path, name: str) -> None:
    model = onnx.load(str(file), load_external_data=False)
    for values in (model.graph.input, model.graph.initializer):
        values.remove(next(value for value in values if value.name == name))
    constant = onnx.helper.make_node("Constant", [], [name], value_ints=[1])
    model.graph.node.insert(0, constant)
    file.write_bytes(model.SerializeToString())
    (file.parent / "manifest.json").unlink()  # or it would be refused for its sha256


PACKED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a row without its shape": (lambda row: row.pop("shape"), "field `shape`"),
    "a shape of one": (lambda row: row.update(shape=[1]), "of length 2"),
    "another shape": (lambda row: row.update(shape=[8, 8]), "do not fit a matrix of 8 x 8"),
    "7 bits": (lambda row: row.update(bits=7), "bits"),
    "groups of 31": (lambda row: row.update(group_size=31), "groups of 31"),
    "an unknown codebook": (lambda row: row.update(codebook="nf5"), "codebook"),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_file_of_a_stranger(case: str, refused: Refused, made: Path, text: Path, tmp_path: Path) -> None:
    """Without a manifest, what describes the matrices is believed only as far as the arrays fit it."""
    spoil, says = PACKED[case]
    shutil.copytree(made / "packed", tmp_path / "packed")
    (tmp_path / "packed" / "manifest.json").unlink()
    file = tmp_path / "packed" / "packed.safetensors"
    arrays = load_file(file)
    with safe_open(file, "np") as opened:
        described = json.loads(opened.metadata()["linears"])
    spoil(next(iter(described.values())))
    save_file(arrays, file, {"linears": json.dumps(described)})
    refused("export", tmp_path / "packed", tmp_path / "out", "--text", text, says=("packed.safetensors is damaged", says))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a version that is an object": (lambda content: content.update(manifest_version={}), "manifest_version"),
    "files that are a text": (lambda content: content.update(files="x"), "manifest.files"),
    "a file that is a number": (lambda content: content["files"].update({"config.json": 5}), "manifest.files"),
    "a file outside": (lambda content: content["files"].update({"../x": {"bytes": 1, "sha256": "0"}}), "'../x'"),
    "facts that are a list": (lambda content: content["steps"][0].update(facts=[1]), "facts"),
    "a stage that steers the terminal": (lambda content: content["steps"][0].update(stage="\x1b]0;x\x07"), "is no stage"),
    "no format": (lambda content: content.pop("format"), "format"),
    "an unknown format": (lambda content: content.update(format="zip"), "format"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_of_the_wrong_types(case: str, refused: Refused, made: Path, tmp_path: Path) -> None:
    """Every value is of the type that the reader needs, or the line says where it is not."""
    spoil, says = MANIFESTS[case]
    shutil.copytree(made / "packed", tmp_path / "packed")
    file = tmp_path / "packed" / "manifest.json"
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    refused("show", tmp_path / "packed", says=("manifest.json", says))


@pytest.mark.parametrize("case", ARTIFACTS)
def test_damaged_artifact(case: str, refused: Refused, made: Path, tmp_path: Path) -> None:
    """What was copied to a device incompletely is named, with the file."""
    spoil, says = ARTIFACTS[case]
    shutil.copytree(made / "onnx", tmp_path / "onnx")
    spoil(tmp_path / "onnx")
    refused("run", tmp_path / "onnx", "Once upon a time", "--max-new-tokens", 2, says=says)


def test_damaged_manifest(refused: Refused, made: Path, tmp_path: Path) -> None:
    """The verb show proves the files against the manifest, and a manifest that is none says so."""
    folder = tmp_path / "onnx"
    shutil.copytree(made / "onnx", folder)
    (folder / "model.onnx.data").write_bytes(b"other bytes")
    refused("show", folder, says=("model.onnx.data", "build the folder again"))
    (folder / "manifest.json").write_text("{}")
    refused("show", folder, says=("manifest.json", "damaged"))
    (folder / "manifest.json").write_text('{"manifest_version": 99, "edgepress": "9.0"}')
    refused("show", folder, says=("newer edgepress", "upgrade"))


RUN = [
    (["Once " * 300], ("exceed the context of 256", "shorten the prompt")),
    (["Once", "--max-new-tokens", "1000"], ("exceed the context of 256", "--max-new-tokens")),
    (["Once", "--max-new-tokens", "-5"], ("max-new-tokens",)),
    (["Once", "--max-new-tokens", "many"], ("--max-new-tokens", "many")),
    (["Once", "--temperature", "-1"], ("temperature",)),
    (["Once", "--temperature", "nan"], ("temperature",)),
    (["Once", "--temperature", "1", "--seed", "-1"], ("seed",)),
    (["Once", "--threads", "-1"], ("threads",)),
    (["Once \udcff"], ("prompt",)),
]


@pytest.mark.parametrize(("arguments", "says"), RUN, ids=[ascii(" ".join(a))[1:40] for a, _ in RUN])
def test_run_refuses(arguments: list[str], says: tuple[str, ...], refused: Refused, made: Path) -> None:
    """Numbers that make no sense are refused, not handed to a library to fail on or to accept."""
    refused("run", made / "onnx", *arguments, says=says)


def test_empty_prompt(refused: Refused, made: Path, tmp_path: Path) -> None:
    """Without BOS an empty prompt gives the model nothing to continue."""
    shutil.copytree(made / "onnx", tmp_path / "onnx")
    content = json.loads((tmp_path / "onnx" / "tokenizer.json").read_text())
    content["post_processor"] = None
    file, manifest = tmp_path / "onnx" / "tokenizer.json", tmp_path / "onnx" / "manifest.json"
    file.write_text(json.dumps(content))
    described = json.loads(manifest.read_text())
    described["files"]["tokenizer.json"]["sha256"] = sha256(file)
    manifest.write_text(json.dumps(described))
    refused("run", tmp_path / "onnx", "", says=("prompt is empty", "give"))


def test_build_finds_what_bench_would_refuse_before_its_first_stage(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Only a few words.")
    build = ("build", tiny, tmp_path / "out", "--remove-count", 1)
    refused(*build, "--text", tmp_path / "a.txt", says=("too short", "give a longer"))
    refused(*build, "--prompt-lengths", 300, says=("context of 256", "shorter --prompt-lengths"))
    assert not (tmp_path / "out").exists()


BENCH = [
    (["--prompt-lengths", "0"], ("--prompt-lengths",)),
    (["--prompt-lengths", "-4"], ("--prompt-lengths",)),
    (["--prompt-lengths", "8,x"], ("--prompt-lengths takes a whole number", "x")),
    (["--prompt-lengths", "300"], ("context of 256", "shorter --prompt-lengths")),
    (["--prompt-lengths", "8", "--new-tokens", "250"], ("context of 256", "fewer --new-tokens")),
    (["--prompt-lengths", "8", "--new-tokens", "1"], ("--new-tokens must be at least 2",)),
    (["--prompt-lengths", "8", "--repeats", "0"], ("--repeats must be at least 1",)),
    (["--prompt-lengths", "8", "--threads", "-1"], ("--threads must be at least 0",)),
    (["--prompt-lengths", "8", "--text", os.devnull], ("not a file", "give a UTF-8 .txt")),
    (["--prompt-lengths", "8", "--reference", "/nowhere"], ("no such folder: /nowhere", "give")),
    (["--prompt-lengths", "8", "--reference", "/nowhere", "--stages", "/nowhere/else"], ("no such folder: /nowhere", "give")),
]


@pytest.mark.parametrize(("arguments", "says"), BENCH, ids=[" ".join(a) for a, _ in BENCH])
def test_bench_refuses(
    arguments: list[str], says: tuple[str, ...], refused: Refused, made: Path, text: Path, tmp_path: Path
) -> None:
    """Before minutes of measuring, where it can be known; and never in an endless loop."""
    flags = ["--text", text, "--text-tokens", 64, "--repeats", 1, "--new-tokens", 4, "--no-original-speed"]
    with no_longer_than(20):
        refused("bench", made / "onnx", "--out", tmp_path / "out", *flags, *arguments, says=says)


def test_reference_with_another_tokenizer(
    refused: Refused, made: Path, copy_of: Copy, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """KL between two readings of a text means nothing."""
    other = copy_of(tiny, "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    flags = [
        "--text",
        text,
        "--text-tokens",
        64,
        "--repeats",
        1,
        "--new-tokens",
        4,
        "--no-original-speed",
        "--prompt-lengths",
        8,
        "--reference",
        other,
    ]
    refused("bench", made / "onnx", "--out", tmp_path / "out", *flags, says=("different tokenizer", "give the checkpoint"))
