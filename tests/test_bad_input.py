"""Whatever a user gets wrong ends in one line that says what and how to mend it, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline import files, stages
from edgepress.pipeline.cli import commands as cli
from safetensors.torch import load_file, save_file
from transformers import XLMConfig

Refused = Callable[..., None]
Copy = Callable[..., Path]

# Every error tells what to do or what is allowed; these are the words it does so with.
ADVICE = re.compile(
    r"--help|\b(give|choose|use|must|should|at most|there are|one of|is true or false|takes|convert|allow|free|fetch|build|delete"
    r"|upgrade|shorten|say how|make one|export (it|again)|leave|quantize (with|again)|pip install|install|check|correct|mend)\b"
)
LOG = re.compile(r"(prune|greedy|quantize|export|bench): ")
COMMANDS = {
    "prune": ("prune", "SRC", "OUT", "--remove-count", "1", "--calibration-tokens", "64"),
    "quantize": ("quantize", "SRC", "OUT", "--method", "rtn"),
    "export": ("export", "SRC", "OUT"),
    "build": ("build", "SRC", "OUT", "--method", "rtn", "--remove-count", "1", "--calibration-tokens", "64"),
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, hidden ones too, with size and time of change (of files alone)."""
    found = {}
    for path in folder.rglob("*"):
        known = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (known.st_size, known.st_mtime_ns)
    return found


def check_refusal(code: int, err: str, says: tuple[str, ...]) -> None:
    *log, last = err.splitlines() or [""]
    assert code == 2 and "Traceback" not in err, err
    assert last.startswith("error: ") and all(LOG.match(line) for line in log), err
    for part in says:
        assert part in last
    if not ADVICE.search(last):
        pytest.fail(f"does not say what to do: {last}")


@pytest.fixture
def refused(call: Callable[..., Any], tmp_path: Path) -> Refused:
    """Run a command; assert exit code 2, one error line with all of ``says`` and advice, and not one file touched or left."""

    def check(*arguments: object, says: tuple[str, ...] | str) -> None:
        before = tree(tmp_path)
        result = call(*arguments)
        check_refusal(result.code, result.err, (says,) if isinstance(says, str) else says)
        assert tree(tmp_path) == before

    return check


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        pytest.fail("hangs")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def command(verb: str, source: object, out: object) -> list[object]:
    return [{"SRC": source, "OUT": out}.get(part, part) for part in COMMANDS[verb]]


# --- the checkpoint


def change(**keys: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | keys).items() if v is not None}))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SOURCES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no such folder", "give a folder")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("has no config.json", "give the folder")),
    "config is no JSON": (write("config.json", b"{model_type: llama"), ("config.json is not valid JSON",)),
    "config is no object": (write("config.json", b"[]"), ("config.json must hold a JSON object",)),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), ("config.json is not valid JSON",)),
    "bert": (change(architectures=["BertModel"], model_type="bert"), ("BertModel", "no causal language model", "give")),
    "t5": (
        change(architectures=["T5ForConditionalGeneration"], model_type="t5"),
        ("T5ForConditionalGeneration", "no causal language model", "give"),
    ),
    "no model type": (change(model_type=None), ("model_type", "give")),
    "pickled": (pickled, ("pickled", "convert", "AutoModelForCausalLM", "save_pretrained")),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no weights", "give the complete checkpoint")),
    "own code": (change(auto_map={"AutoModelForCausalLM": "own.Own"}), ("Python code", "--trust-remote-code")),
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
    refused(*command("prune", source, tmp_path / "out"), says=("model.layers.2.mlp.up_proj.weight", "NaN or Inf", "fetch it again"))


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("case", SOURCES)
def test_unusable_checkpoint(case: str, verb: str, refused: Refused, copy_of: Copy, tiny: Path, tmp_path: Path) -> None:
    """Found before a weight is read, by every verb alike."""
    spoil, says = SOURCES[case]
    source = copy_of(tiny)
    spoil(source)
    refused(*command(verb, source, tmp_path / "out"), says=says)


DAMAGED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "unknown model type": (change(model_type="quux", architectures=None), ("quux",)),
    "no such tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), ("tokenizer.json",)),
    "layer count is text": (change(num_hidden_layers="four"), ("config.json",)),
    "context is text": (change(max_position_embeddings="long"), ("config.json",)),
    "negative hidden size": (change(hidden_size=-64), ("do not fit",)),
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


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def flip_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8:12] = b"\x00\xff\x00\xff"
    file.write_bytes(content)


WEIGHTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in the data": (cut(2_000_000), "cut short"),
    "cut in the header": (cut(500), "cut short"),
    "empty": (cut(0), "cut short"),
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


# --- options


OPTIONS = [
    ("prune --remove-count 4", ("cannot remove 4 of 4", "at most 3")),
    ("prune --remove-count 9", ("cannot remove 9 of 4", "at most 3")),
    ("prune --remove-count -1", ("--remove-count must be at least 0",)),
    ("prune --remove-count 1.5", ("--remove-count takes a whole number", "1.5")),
    ("prune --remove-fraction 0", ("--remove-fraction", "between 0 and 1")),
    ("prune --remove-fraction 1", ("--remove-fraction", "between 0 and 1")),
    ("prune --remove-fraction 1.5", ("--remove-fraction", "between 0 and 1", "1.5")),
    ("prune --remove-fraction nan", ("--remove-fraction", "takes a number")),
    ("prune --remove-count 1 --remove-fraction 0.5", ("not both",)),
    ("prune", ("--remove-count", "--remove-fraction")),
    ("prune --criterion lowest --remove-count 1", ("unknown criterion 'lowest'", "greedy, bi, angular, list")),
    ("prune --criterion list", ("--criterion list needs", "--remove-layers 4,5")),
    ("prune --criterion bi --remove-layers 1", ("--remove-layers names the layers already", "--criterion bi")),
    ("prune --remove-layers 1,2 --remove-count 2", ("--remove-layers names the layers already", "--remove-count")),
    ("prune --layers 1,2", ("--layers is now --remove-layers",)),
    ("prune --remove-layers 1 --max-loss 0.1", ("--remove-layers names the layers already", "--max-loss")),
    ("prune --remove-layers 2,1,2", ("--remove-layers names a layer twice", "2, 1, 2")),
    ("prune --remove-layers 1,4", ("no layer 4 in a model of 4", "0 to 3")),
    ("prune --remove-layers -1", ("--remove-layers must be at least 0",)),
    ("prune --remove-layers 0,1,2,3", ("cannot remove 4 of 4", "at most 3")),
    ("prune --remove-layers two", ("--remove-layers takes a whole number", "two")),
    ("prune --max-loss -0.1", ("--max-loss must be at least 0",)),
    ("prune --max-loss nan", ("--max-loss takes a number",)),
    ("prune --remove-layers 1 --shortlist 0", ("--shortlist must be at least 1",)),
    ("prune --remove-layers 1 --calibration-tokens 9000000", ("too short", "9000000 were asked for", "ask for fewer")),
    ("build --remove-layers 1,7", ("no layer 7 in a model of 4",)),
    ("quantize --method gtpq", ("unknown method 'gtpq'", "did you mean 'gptq'?")),
    ("quantize --bits 5", ("--bits", "2, 3, 4, 8", "5")),
    ("quantize --bits four", ("--bits takes a whole number", "four")),
    ("quantize --group-size 33", ("--group-size", "32, 64", "33")),
    ("quantize --method nf4 --bits 8", ("nf4 weights have 4 bits, not 8", "leave --bits out")),
    ("quantize --method int8 --bits 4", ("int8 weights have 8 bits, not 4", "leave --bits out")),
    ("quantize --method nf4 --group-size 32", ("nf4 has blocks of 64, 128 or 256", "--group-size", "32")),
    ("quantize --method fp4 --symmetric", ("fp4 takes no --symmetric", "use --method")),
    ("quantize --method rtn --act-order", ("--act-order is for gptq", "rtn")),
    ("quantize --method rtn --bits-for mlp", ("--bits-for takes PATTERN=BITS", "mlp")),
    ("quantize --method rtn --bits-for .*=5", ("--bits-for takes PATTERN=BITS", "one of 2, 3, 4, 8, 16")),
    ("quantize --method rtn --bits-for (=8", ("'(' is no regular expression", "correct")),
    ("quantize --method rtn --bits-for layers.9.*=8", ("first match of no matrix", "model.layers.0.", "correct")),
    ("quantize --method nf4 --bits-for .*=8", ("nf4 takes no --bits-for", "use --method")),
    ("quantize --method rtn --embedding-bits 3", ("--embedding-bits is one of 4, 8, 16",)),
    ("quantize --calibration-tokens 3", ("--calibration-tokens must be at least 16",)),
    ("export --exporter fussed", ("unknown exporter 'fussed'", "did you mean 'fused'?")),
    ("export --target gpu", ("unknown target 'gpu'", "cpu")),
    ("export --accuracy-level 3", ("unknown accuracy level '3'", "auto, 4, 0")),
    ("export --min-agreement 1.5", ("--min-agreement is a share", "1.5")),
    ("export --exact-layers (", ("--exact-layers", "no regular expression", "correct")),
    ("export --accuracy-level 0 --exact-layers 2", ("--exact-layers is for int8", "leave one")),
    ("quantize --methd rtn", ("--methd", "--help")),
    ("build --recipe defalt", ("no recipe 'defalt'", "did you mean 'default'?")),
    ("build --recipe absent.yaml", ("no recipe 'absent.yaml'", "give a YAML file")),
    ("build --remove-count 4 --method rtn", ("cannot remove 4 of 4", "at most 3")),
    ("build --bits 5", ("--bits", "2, 3, 4, 8")),
]


@pytest.mark.parametrize(("line", "says"), OPTIONS, ids=[line for line, _ in OPTIONS])
def test_bad_option(line: str, says: tuple[str, ...], refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """The flag, the value and what is allowed stand in the line."""
    verb, *flags = line.split()
    refused(verb, tiny, tmp_path / "out", *flags, says=says)


@pytest.mark.parametrize("arguments", [[], ["prnue", "a", "b"], ["prune"], ["run", "a"], ["--nonsense"]], ids=" ".join)
def test_bad_command_line(arguments: list[str], refused: Refused) -> None:
    """The complaints of argparse itself take one line too, and name the help."""
    refused(*arguments, says="--help")


RECIPES = [
    ("prun: {remove_count: 1}", ("unknown stage 'prun'", "did you mean 'prune'?")),
    ("quantize: {bitz: 4}", ("unknown option of quantize 'bitz'", "did you mean 'bits'?")),
    ("quantize: {4: 4}", ("unknown option of quantize '4'", "bits")),
    ("quantize: {bits: 5}", ("--bits", "2, 3, 4, 8")),
    ("quantize: {method: rtn, head_bits: null}", ("--head-bits",)),
    ("quantize: {bits: 4.5}", ("--bits", "whole number")),
    ("quantize: {calibration: null}", ("--calibration",)),
    ("quantize: {symmetric: maybe}", ("--symmetric is true or false", "maybe")),
    ("quantize: {method: [rtn]}", ("method",)),
    ("export: {text: 5}", ("--text", "5")),
    ("prune: {remove_count: 1, remove_fraction: 0.5}", ("not both",)),
    ("bench: {}", ("bench cannot follow", "onnx")),
    ("export: {}\nquantize: {method: rtn}", ("quantize cannot follow", "hf", "onnx")),
    ("quantize: {method: rtn}\nprune: {remove_count: 1}", ("prune cannot follow", "hf", "packed")),
    ("quantize: {method: rtn", ("not valid YAML",)),
    ("quantize: &a [*b]", ("not valid YAML",)),
    ("\x00", ("not valid YAML",)),
    ("- quantize", ("must map each stage",)),
    ("quantize: rtn", ("must map each stage",)),
    ("", ("must map each stage",)),
    ("{}", ("stage",)),
]


@pytest.mark.parametrize(("content", "says"), RECIPES, ids=[content or "empty" for content, _ in RECIPES])
def test_bad_recipe(content: str, says: tuple[str, ...], refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A recipe is checked whole before the first stage begins, also one of odd keys and values."""
    (tmp_path / "own.yaml").write_text(content)
    refused("build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", says=says)


def test_odd_recipe_keys_beside_flags(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """A flag is merged with the recipe's keys, whatever these are."""
    (tmp_path / "own.yaml").write_text("prune: {4: 2}")
    refused(
        "build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", "--remove-count", 1, says="unknown option of prune '4'"
    )


def test_flag_that_no_stage_takes(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """Silently ignored, it would leave the user believing in it."""
    (tmp_path / "own.yaml").write_text("quantize: {method: rtn}")
    refused("build", tiny, tmp_path / "out", "--recipe", tmp_path / "own.yaml", "--repeats", 3, says="repeats")


# --- texts


TEXTS: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "too short": ("a.txt", b"Only a few words.", ("too short", "give a longer text")),
    "empty": ("a.txt", b"", ("too short", "give a longer text")),
    "missing": ("a.txt", None, ("cannot read the text", "No such file", "give")),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 4000, ("not UTF-8", "give a UTF-8")),
    "a folder": ("", None, ("text", "give")),
    "jsonl without text": ("a.jsonl", b'{"body": "x"}\n', ("a.jsonl", "'text' field")),
    "jsonl of numbers": ("a.jsonl", b'{"text": 3}\n', ("a.jsonl", "'text' field")),
    "jsonl that is none": ("a.jsonl", b"plain words\n", ("a.jsonl", "'text' field")),
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


def test_failed_build_leaves_no_folder(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    """The first stage's failure leaves the disk as it was, also the OUT that was made for it."""
    refused(*command("build", tiny, tmp_path / "out"), "--calibration", tmp_path / "absent.txt", says="cannot read the text")


# --- the output


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


def test_output_without_permission(refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before the work, not found out after it."""
    monkeypatch.setattr(files.os, "access", lambda *_, **__: False)
    refused(*command("quantize", tiny, tmp_path / "out"), says=("no permission", "choose another output folder"))


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
    refused(
        *command("quantize", tmp_path / "pruned", tmp_path / "pruned"),
        says=("overwrite its own source", "choose another output folder"),
    )
    refused("prune", tiny, tiny, "--remove-count", 1, says=("did not write", "choose another output folder"))


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
    refused(*command(verb, tiny, tmp_path / "out"), says=("not enough disk space", str(tmp_path), "free some"))


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
        (source / "tokenizer.json").unlink()  # else copying it fails first, and the weights' own writer is not reached
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
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    check_refusal(done.returncode, done.stderr, ("too large", "choose another output folder"))
    assert not list(tmp_path.iterdir())


# --- what follows the checkpoint: packed folders, artifacts


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


def test_three_bits_have_no_operator(refused: Refused, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Good for measuring, not for shipping: said at export, with the bits that work."""
    assert cli.main(["quantize", str(tiny), str(tmp_path / "packed"), "--method", "rtn", "--bits", "3"]) == 0
    refused("export", tmp_path / "packed", tmp_path / "out", "--text", text, says=("3-bit", "--bits 2, 4 or 8"))


def test_damaged_packed_file(refused: Refused, made: Path, text: Path, tmp_path: Path) -> None:
    """Cut short after it was written, the codes are not guessed."""
    shutil.copytree(made / "packed", tmp_path / "packed")
    cut(1000)(tmp_path / "packed" / "packed.safetensors")
    refused("export", tmp_path / "packed", tmp_path / "out", "--text", text, says=("packed.safetensors", "build that folder again"))


ARTIFACTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "graph is none": (write("model.onnx", b"nothing of the kind"), "model.onnx"),
    "weights missing": (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx"),
    "weights cut": (lambda folder: os.truncate(folder / "model.onnx.data", 1000), "model.onnx"),
    "no GenAI config": (lambda folder: (folder / "genai_config.json").unlink(), "genai_config.json"),
    "GenAI config is no JSON": (write("genai_config.json", b"{"), "genai_config.json"),
    "GenAI config says nothing": (write("genai_config.json", b"{}"), "genai_config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), "tokenizer.json"),
}


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
    (tmp_path / "onnx" / "tokenizer.json").write_text(json.dumps(content))
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
    (["--prompt-lengths", "8", "--text", os.devnull], ("too short", "give a longer text")),
    (["--prompt-lengths", "8", "--reference", "/nowhere"], ("no such folder: /nowhere", "give")),
    (["--prompt-lengths", "8", "--reference", "/nowhere", "--stages", "/nowhere/else"], ("no such folder: /nowhere", "give")),
]


@pytest.mark.parametrize(("arguments", "says"), BENCH, ids=[" ".join(a) for a, _ in BENCH])
def test_bench_refuses(
    arguments: list[str], says: tuple[str, ...], refused: Refused, made: Path, text: Path, tmp_path: Path
) -> None:
    """Before minutes of measuring, where it can be known; and never in an endless loop."""
    flags = ["--text", text, "--text-tokens", 64, "--repeats", 1, "--new-tokens", 4]
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
    flags = ["--text", text, "--text-tokens", 64, "--repeats", 1, "--new-tokens", 4, "--prompt-lengths", 8, "--reference", other]
    refused("bench", made / "onnx", "--out", tmp_path / "out", *flags, says=("another tokenizer", "give the checkpoint"))
