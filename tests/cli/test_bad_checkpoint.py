"""Checkpoints that cannot be used end in one line, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline.checkpoint.source import resolve
from refusal import COMMANDS, Copy, Refused, command, no_longer_than, truncated_to, write
from safetensors.torch import load_file, save_file
from transformers import XLMConfig


def change(**keys: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | keys).items() if v is not None}))

    return edit


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def marked(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def yarn(**settings: float) -> Callable[[Path], None]:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    return change(rope_parameters=rope | settings)


SOURCES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no such folder", "give a folder")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("has no config.json", "give the folder")),
    "config is no JSON": (write("config.json", b"{model_type: llama"), ("config.json is not valid JSON",)),
    "config is no object": (write("config.json", b"[]"), ("config.json is not a JSON object",)),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), ("config.json is not valid JSON",)),
    "bert": (change(architectures=["BertModel"], model_type="bert"), ("BertModel", "not a causal language model", "give")),
    "t5": (
        change(architectures=["T5ForConditionalGeneration"], model_type="t5"),
        ("T5ForConditionalGeneration", "not a causal language model", "give"),
    ),
    "no model type": (change(model_type=None), ("model_type", "give")),
    "pickled": (pickled, ("pickled", "convert", "AutoModelForCausalLM", "save_pretrained")),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no weights", "give the complete checkpoint")),
    "own code": (change(auto_map={"AutoModelForCausalLM": "own.Own"}), ("Python code", "--trust-remote-code")),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("has no tokenizer.json", "give the complete")),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"),
        ("has no tokenizer.json", "transformers cannot make one"),
    ),
    "adapter": (adapter, ("holds an adapter, which is no model", "merge it first, so: python -c", "from_pretrained('me/base')")),
    "adapter beside a model": (write("adapter_config.json", b"{}"), ("a model and an adapter", "merge it first, so: python -c")),
    "weights that git-LFS has not fetched": (
        write("model.safetensors", POINTER),
        ("model.safetensors is a git-LFS pointer", "run 'git lfs pull'"),
    ),
    "a tokenizer that git-LFS has not fetched": (
        write("tokenizer.json", POINTER),
        ("tokenizer.json is a git-LFS pointer", "run 'git lfs pull'"),
    ),
    "a byte-order mark": (marked, ("config.json begins with a byte-order mark", "replace it")),
    "a pipe for weights": (pipe, ("model.safetensors is not a file", "give")),
    "a negative rotary factor": (yarn(factor=-4.0), ("rope_parameters.factor is -4.0", "greater than 0")),
    "no rotary base": (yarn(rope_theta=0), ("rope_parameters.rope_theta is 0", "greater than 0")),
    "an end that is no token": (
        write("generation_config.json", b'{"eos_token_id": "</s>"}'),
        ("generation_config.json: eos_token_id is '</s>'", "must be a token id"),
    ),
    "quantized": (change(quantization_config={"quant_method": "awq", "bits": 4}), ("already quantized (awq)", "give the original")),
}


def test_blocks_that_cannot_be_told(refused: Refused, tmp_path: Path, random_model: Callable[..., Path], text: Path) -> None:
    """XLM keeps attentions, norms and feed-forwards in four lists of its depth, and no list of blocks."""
    config = XLMConfig(vocab_size=5120, emb_dim=64, n_layers=4, n_heads=4, max_position_embeddings=128, causal=True)
    folder = random_model(config, tmp_path / "xlm")
    refused(
        "prune",
        folder,
        tmp_path / "out",
        "--remove-layers",
        "1",
        "--calibration",
        text,
        says=("cannot tell the decoder blocks", "XLM"),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """The tensor, and with it the layer, is named before anything is measured."""
    source = copy_of(tiny)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    says = ("model.layers.2.mlp.up_proj.weight", "NaN or Inf", "give another one")
    refused(*command("prune", source, tmp_path / "out"), says=says)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        "merges.txt",
        *("added_tokens.json", "vocab.json", "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json"),
    ],
)
def test_a_file_without_end(name: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Nothing of it is read, by us or by a library."""
    source = copy_of(tiny)
    (source / name).touch()
    os.truncate(source / name, 1 << 40)
    with no_longer_than(20):
        refused(*command("quantize", source, tmp_path / "out"), says=(name, "too large"))


def test_a_map_of_special_tokens_with_millions_of_values(refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Transformers took 44 s of a busy processor for 63 MB of them; 4 MB are read."""
    source = copy_of(tiny)
    (source / "special_tokens_map.json").write_text('{"x": [' + ",".join(["[]"] * (5 << 19)) + "]}")
    refused(*command("quantize", source, tmp_path / "out"), says=("special_tokens_map.json", "too large"))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "merges.txt", "tokenizer_config.json"])
def test_what_is_no_file(name: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """A pipe is not waited for."""
    source = copy_of(tiny)
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with no_longer_than(20):
        refused(*command("quantize", source, tmp_path / "out"), says=(name, "is not a file"))


def test_a_header_without_end(refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    source = copy_of(tiny)
    (source / "model.safetensors").write_bytes((100 << 20).to_bytes(8, "little"))
    os.truncate(source / "model.safetensors", 101 << 20)
    with no_longer_than(20):
        refused(*command("quantize", source, tmp_path / "out"), says=("model.safetensors", "too large"))


def test_the_line_of_a_config_error_that_says_the_reason(refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Transformers wraps it in another, whose first line names only the check that failed."""
    source = copy_of(tiny, layer_types=["full_attention"] * 7, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    refused(*command("export", source, tmp_path / "out"), says=("`num_hidden_layers` (4)", "`layer_types` (7)"))


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("case", SOURCES)
def test_unusable_checkpoint(case: str, verb: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Found before a weight is read, by every verb alike."""
    spoil, says = SOURCES[case]
    source = copy_of(tiny)
    spoil(source)
    with no_longer_than(20):
        refused(*command(verb, source, tmp_path / "out"), says=says)


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("file", [None, "tokenizer.model"])
def test_no_tokenizer_that_can_be_made(
    file: str | None, verb: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path
) -> None:
    """Said by the first stage, also by one that reads no text."""
    source = copy_of(tiny)
    (source / "tokenizer.json").unlink()
    if file:
        (source / file).write_bytes(b"no sentencepiece model")
    refused(*command(verb, source, tmp_path / "out"), says=("has no tokenizer.json", "give the complete checkpoint"))


def test_a_token_beyond_the_embedding(refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """A token that was added to the tokenizer and never to the model: named, and refused where the text has it."""
    source, calibration = copy_of(tiny), tmp_path / "text.txt"
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {"id": 5120, "content": "<pad>", "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    )
    (source / "tokenizer.json").write_text(json.dumps(content))
    calibration.write_text("The girl went to the river.<pad>\n" * 100)
    says = ("text.txt has the token '<pad>', number 5120, beyond the 5120 rows", "leave it out")
    refused(*command("prune", source, tmp_path / "out"), "--calibration", calibration, says=says)


DAMAGED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "unknown model type": (change(model_type="quux", architectures=None), ("quux",)),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), ("tokenizer.json",)),
    "layer count is text": (change(num_hidden_layers="four"), ("config.json",)),
    "context beyond any memory": (change(max_position_embeddings=1 << 31), ("max_position_embeddings", "16,777,216")),
    "context is text": (change(max_position_embeddings="long"), ("config.json",)),
    "negative hidden size": (change(hidden_size=-64), ("hidden_size is -64",)),
    "an activation that is none": (change(hidden_act="foo"), ("config.json", "hidden_act is 'foo', which it does not know")),
    "a rotary embedding that is none": (
        change(rope_parameters={"rope_type": "foo", "rope_theta": 10000.0}),
        ("config.json", "rope_type is 'foo', which it does not know"),
    ),
    "padding beyond the embedding": (change(pad_token_id=99999), ("config.json", "pad_token_id is 99999, and vocab_size 5120")),
    "other shapes": (change(vocab_size=5121), ("do not fit",)),
    "more layers than weights": (change(num_hidden_layers=6), ("lacks weights", "layers.4")),
}


@pytest.mark.parametrize("verb", ["prune", "export"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoint(case: str, verb: str, refused: Refused, copy_of: Copy, tiny: Path, text: Path, tmp_path: Path) -> None:
    """What only shows when the model is loaded is said as plainly."""
    spoil, says = DAMAGED[case]
    source = copy_of(tiny)
    spoil(source)
    refused(*command(verb, source, tmp_path / "out"), "--calibration" if verb == "prune" else "--text", text, says=says)


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def flip_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:12] = b"\x00\xff\x00\xff"
    file.write_bytes(content)


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"the rest of another file")


WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in the data": (truncated_to(2_000_000), "cut short"),
    "cut in the header": (truncated_to(500), "cut short"),
    "empty": (truncated_to(0), "cut short"),
    "with more behind its end": (append, "has more behind its end"),
    "header garbled": (flip_header, "damaged"),
    "a tensor missing": (drop_tensor, "model.layers.2.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("verb", ["prune", "quantize", "export"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_damaged_weights(case: str, verb: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """A broken download must not become a model, and must be named."""
    spoil, says = WEIGHTS[case]
    source = copy_of(tiny)
    spoil(source / "model.safetensors")
    refused(*command(verb, source, tmp_path / "out"), says=(says, str(source)))


def test_trusted_code_is_run(
    call: Callable[..., Any], copy_of: Copy, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag that the refusal names does allow it, for the model that brings its own classes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = copy_of(
        tiny,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (source / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    result = call(*command("prune", source, tmp_path / "out"), "--trust-remote-code")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "own.py").is_file()


def test_code_of_a_hub_model_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, --trust-remote-code could never load a model from the hub that brings code."""
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.py" in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("somebody/model") == resolve("somebody/model@v1.0") == tmp_path
    assert asked == [("somebody/model", None), ("somebody/model", "v1.0")]


def test_the_revision_of_a_hub_model_is_recorded(call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    """A branch moves on: the manifest says which commit an artifact was made of."""
    snapshot = tmp_path / "models--somebody--a--b" / "snapshots" / ("c0ffee" * 6 + "beef")
    shutil.copytree(tiny, snapshot)
    assert call("quantize", snapshot, tmp_path / "out", "--method", "rtn").code == 0
    (step,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"]
    assert step["facts"]["downloaded"] == {"model": "somebody/a--b", "revision": snapshot.name}


def test_unreachable_hub_model(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder looks like a hub id: the line must speak of both."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(
        *command("quantize", "nobody/nothing", tmp_path / "out"), says=("no folder 'nobody/nothing'", "no network", "local folder")
    )


@pytest.mark.parametrize("verb", ["bench", "run", "show", "verify"])
def test_missing_artifact(verb: str, refused: Refused, tmp_path: Path) -> None:
    """The verbs that read artifacts name the folder they were given."""
    refused(verb, tmp_path / "absent", *(["Once"] if verb == "run" else []), says="absent")


@pytest.mark.parametrize("verb", ["bench", "run", "verify", "report"])
def test_a_file_where_an_artifact_is_asked_for(verb: str, refused: Refused, tmp_path: Path) -> None:
    """It is there, so that it is not is no help."""
    (tmp_path / "note.txt").write_text("words")
    refused(verb, tmp_path / "note.txt", *(["Once"] if verb == "run" else []), says=("note.txt is a file", "give"))


def test_a_config_of_no_model_is_not_shown(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused("show", tmp_path, says=("config.json has no model_type", "give another folder"))
