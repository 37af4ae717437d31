"""The command line as a user meets it: help that is quick and complete, text that streams, packages that are missing."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.pipeline import options, recipe
from edgepress.pipeline.cli import commands as cli
from edgepress.pipeline.cli import terminal
from edgepress.pipeline.cli.parser import parser
from edgepress.pipeline.flags import setting_of
from edgepress.pipeline.model_files import end_tokens
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.generate import stream
from edgepress.pipeline.text.windows import load_tokenizer
from patience import HUNG

Call = Callable[..., Any]

VERBS = [
    "build",
    "fetch",
    "import",
    "prune",
    "heal",
    "narrow",
    "page",
    "quantize",
    "export",
    "bench",
    "machine",
    "plan",
    "report",
    "run",
    "sensitivity",
    "serve",
    "show",
    "sweep",
    "trim",
    "tune",
    "verify",
]
CLASSES = [
    c
    for _, c in inspect.getmembers(options, inspect.isclass)
    if c.__module__ == options.__name__ and issubclass(c, options.Options)
]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "03-quantize"
    assert cli.main(["quantize", str(tiny), str(out), "--method", "rtn"]) == 0
    return out


@pytest.fixture(scope="module")
def exported(packed: Path, text: Path) -> Path:
    out = packed.parent / "04-export"
    assert cli.main(["export", str(packed), str(out), "--text", str(text)]) == 0
    return out


# --- help


def test_help_of_every_verb_needs_no_heavy_package() -> None:
    """A second of imports before each --help or typing error would be a bad tool, and the light installation has none of them."""
    code = f"""
import sys
from edgepress.pipeline.cli import main
for arguments in [["--help"], ["--version"], *([verb, "--help"] for verb in {VERBS}), ["prune", "--nonsense"]]:
    try:
        main(arguments)
    except SystemExit as stop:
        print("code", stop.code)
heavy = {{"torch", "transformers", "onnxruntime", "onnx", "safetensors", "tokenizers", "huggingface_hub", "numpy", "msgspec"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^code (\d)$", done.stdout, re.MULTILINE) == ["0"] * (2 + len(VERBS)) + ["2"]
    assert len(done.stderr.splitlines()) == 1


def test_a_command_that_is_not_there(call: Call) -> None:
    """Mistyped: the nearest is named."""
    result = call("buidl", "reference")
    assert result.code == 2 and "there is no command 'buidl' (did you mean 'build'?)" in result.err and result.err.count("\n") == 1
    assert "there is no command 'plan's'" in call("plan's").err


def test_help_looks_up_no_version() -> None:
    """Reading a package's metadata imports parsers of mail: a tenth of the time that --help takes."""
    code = "import sys; from edgepress.pipeline.cli import main\ntry: main(['--help'])\nfinally: print('email' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HUNG)
    assert done.stdout.endswith("False\n")


def test_help_of_build_gives_what_the_recipe_gives(call: Call) -> None:
    """The flags' own defaults are those of single stages."""
    text = " ".join(call("build", "--help").out.replace("-\n", "-").split())
    for stage, given in recipe.read("default").items():
        assert " ".join([stage, *(f"--{key.replace('_', '-')} {value}" for key, value in given.items())]) in text


def test_help_runs_as_a_module_and_names_every_verb(edgepress: Call) -> None:
    """The way that Python users start it, from any folder."""
    result = edgepress("--help", cwd=Path("/"))
    assert result.code == 0 and not result.err
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\s+\w", result.out, re.MULTILINE), verb


def test_table_of_verbs_is_whole() -> None:
    """The lists in this file are complete: a new verb or option class is tested as well."""
    assert set(VERBS) == set(cli.STAGES) | set(cli.COMMANDS)
    assert {stage.options for stage in cli.STAGES.values()} | {
        options.BoundOptions,
        options.MachineOptions,
        options.PlanOptions,
        options.RunOptions,
        options.SensitivityOptions,
        options.ServeOptions,
        options.SweepOptions,
        options.VerifyOptions,
    } == set(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_option_is_in_the_help(cls: type, call: Call) -> None:
    """Of build and of the verb of its own, with what it means and which values there are."""
    verbs = [name for name, stage in cli.STAGES.items() if stage.options is cls]
    alone = {
        options.BoundOptions: "build",
        options.MachineOptions: "machine",
        options.PlanOptions: "plan",
        options.RunOptions: "run",
        options.SensitivityOptions: "sensitivity",
        options.ServeOptions: "serve",
        options.SweepOptions: "sweep",
        options.VerifyOptions: "verify",
    }
    built = ["build"] if verbs and cls is not options.PageOptions else []  # which no shipped recipe has
    for shown in [call(verb, "--help") for verb in ([*built, *verbs] or [alone[cls]])]:
        assert shown.code == 0
        text = " ".join(shown.out.split())
        for item in dataclasses.fields(cls):
            flag = options.flag(item.name)
            assert re.search(rf"{flag}(?![\w-])", text), flag
            assert setting_of(item).help.split(" ")[0] in text
            for choice in setting_of(item).choices:
                assert str(choice) in text, (flag, choice)


# --- show


def test_show_tells_every_stage(call: Call, packed: Path, exported: Path) -> None:
    """Options, facts and files of the whole line, from the artifact alone or from the OUT of a build."""
    result = call("show", exported)
    assert result.code == 0, result.err
    for part in ("1. quantize", "2. export", 'method: "rtn"', "group_size: 128", "relative_error", "parity", "model.onnx.data"):
        assert part in result.out
    assert call("show", exported.parent).out == result.out
    assert "2. export" not in call("show", packed).out


def test_show_of_a_plain_checkpoint(call: Call, tiny: Path) -> None:
    """No manifest is no error: it says what the folder is."""
    result = call("show", tiny)
    assert result.code == 0 and "Hugging Face checkpoint (llama)" in result.out and str(tiny) in result.out


# --- run


def greedy(folder: Path, prompt: str, count: int) -> tuple[list[int], str]:
    """Token ids and text of a plain loop."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(prompt).ids
    tokens = list(Decoder(folder).greedy(np.array(ids), count, end_tokens(folder)))
    return tokens, tokenizer.decode([*ids, *tokens])


@pytest.mark.parametrize("prompt", [PROMPT, "The", "Lily saw a café"])
@pytest.mark.parametrize("count", [1, 40])
def test_run_prints_what_a_plain_loop_gives(prompt: str, count: int, call: Call, exported: Path) -> None:
    """Streaming must neither lose nor double a character, spaces and split ones included."""
    tokens, text = greedy(exported, prompt, count)
    assert tokens
    result = call("run", exported, prompt, "--max-new-tokens", count)
    assert result.code == 0 and result.out == text.rstrip("\ufffd") + "\n"
    assert call("run", exported.parent, prompt, "--max-new-tokens", count).out == result.out


@pytest.mark.parametrize("prompt", [(), ("-",)])
def test_run_reads_the_prompt_from_a_pipe(
    prompt: tuple[str, ...], call: Call, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    piped = call("run", exported, *prompt, "--max-new-tokens", 5)
    assert piped.out == call("run", exported, PROMPT, "--max-new-tokens", 5).out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "give a text to continue" in call("run", exported).err


def test_a_flag_that_is_nearly_one(call: Call) -> None:
    assert "did you mean '--remove-count'?" in call("prune", "a", "b", "--remove-cuont", 3).err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("arguments", [("show",), ("run", PROMPT)])
def test_output_that_cannot_be_written(arguments: tuple[str, ...], exported: Path) -> None:
    """One line, exit 2, and Python does not say it again as it ends."""
    command = [sys.executable, "-m", "edgepress.pipeline.cli", arguments[0], str(exported), *arguments[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HUNG)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith("error: cannot write") and "Exception ignored" not in done.stderr


def test_run_streams(exported: Path) -> None:
    """Pieces come while the model works, not all at the end."""
    pieces = list(stream(exported, PROMPT, options.RunOptions(max_new_tokens=20)))
    assert len(pieces) > 5 and "".join(pieces) == greedy(exported, PROMPT, 20)[1].rstrip("\ufffd")
    assert next(stream(exported, PROMPT, options.RunOptions())) == pieces[0] == PROMPT


def test_run_keeps_text_before_a_cut_character(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token may end within a character: what is whole before it is still text."""
    tokenizer = load_tokenizer(exported)
    dragon = tokenizer.encode("🐉", add_special_tokens=False).ids
    assert len(dragon) > 1
    forced = [*tokenizer.encode(" dog", add_special_tokens=False).ids, dragon[0]]
    tokens = iter(forced)
    monkeypatch.setattr("edgepress.pipeline.runtime.sampler.Sampler.__call__", lambda *_: next(tokens))
    told = stream(exported, PROMPT, options.RunOptions(max_new_tokens=len(forced)))
    assert "".join(told) == PROMPT + " dog"


def test_show_of_an_artifact_that_lost_its_manifest(call: Call, exported: Path, tmp_path: Path) -> None:
    """No checkpoint, for all that its config.json says."""
    copy = shutil.copytree(exported, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    assert "an ONNX model whose manifest.json is missing" in call("show", copy).out


def test_run_shows_the_prompt_when_the_model_ends_at_once(call: Call, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token first is an answer too: an empty line would look like a failure."""
    monkeypatch.setattr("edgepress.pipeline.runtime.sampler.Sampler.__call__", lambda *_: 0)
    assert 0 in end_tokens(exported)
    result = call("run", exported, PROMPT)
    assert result.code == 0 and result.out == PROMPT + "\n"


def test_temperature_varies_by_seed_alone(call: Call, exported: Path) -> None:
    """A sample can be repeated, and another seed gives another."""
    told = [call("run", exported, PROMPT, "--max-new-tokens", 20, "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2)]
    assert told[0] == told[1] != told[2]


# --- packages


def test_double_runtime_is_named(call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both onnxruntime and onnxruntime-gpu installed overwrite each other's files; nothing else would tell."""
    monkeypatch.setattr("edgepress.pipeline.registry.version", lambda name: "1.0")
    result = call("show", tiny)
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("warning: ") and "onnxruntime and onnxruntime-gpu" in line and "pip uninstall -y" in line
    monkeypatch.setattr("edgepress.pipeline.registry.version", lambda name: None if name == "onnxruntime-gpu" else "1.0")
    assert not call("show", tiny).err


MISSING = [
    ("gptqmodel", "build", "quantize SRC OUT --method gptqmodel"),
    ("bitsandbytes", "build", "quantize SRC OUT --method nf4"),
    ("onnxruntime", "cpu", "export SRC OUT"),
    ("onnxruntime", "cpu", "run ONNX Once"),
]


@pytest.mark.parametrize(("package", "extra", "line"), MISSING, ids=[f"{p}-{line.split()[0]}" for p, _, line in MISSING])
def test_missing_package_is_named(
    package: str, extra: str, line: str, call: Call, tiny: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that brings it, and nothing half-made."""
    monkeypatch.setitem(sys.modules, package, None)
    places = {"SRC": tiny, "OUT": tmp_path / "out", "ONNX": exported}
    result = call(*(places.get(part, part) for part in line.split()))
    assert result.code == 2
    assert result.err.splitlines()[-1] == f"error: {package} is not installed; in a clone of edgepress: pip install -e '.[{extra}]'"
    assert not list(tmp_path.iterdir())


LIGHT = [
    ("torch", "prune SRC OUT --remove-layers 1"),
    ("onnx_ir", "export SRC OUT"),
    ("torch", "bench ONNX --reference SRC --out OUT --repeats 1 --text-tokens 64 --prompt-lengths 8 --new-tokens 4"),
]


@pytest.mark.parametrize(("package", "line"), LIGHT, ids=[f"{p}-{line.split()[0]}" for p, line in LIGHT])
def test_light_installation_names_what_a_stage_needs(package: str, line: str, tiny: Path, exported: Path, tmp_path: Path) -> None:
    """On the device there is no torch: the verbs that need it say so in one line."""
    code = "import sys; sys.modules[sys.argv[1]] = None; from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[2:]))"
    places = {"SRC": str(tiny), "OUT": str(tmp_path / "out"), "ONNX": str(exported)}
    arguments = [package, *(places.get(part, part) for part in line.split())]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {package} is not installed; in a clone of edgepress: pip install -e '.[build]'"
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_run_and_show_work_without_the_build_packages(exported: Path) -> None:
    """What ships to the device is run with numpy, tokenizers and onnxruntime alone."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'onnx', 'onnx_ir'])); "
        "from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (["run", str(exported), PROMPT, "--max-new-tokens", "2"], ["show", str(exported)]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HUNG)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "says", "never"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/model.safetensors"), "cannot use /data/model.safetensors", "disk space"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/config.json"), "may read and write it", "disk space"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "cannot write /out/x: No space left", "cannot use"),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), "pip install -e '.[tasks]'", "Traceback"),
    ],
)
def test_a_read_that_fails_does_not_blame_the_disk(
    error: Exception, says: str, never: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert terminal.exit_code(error) == 2
    line = capsys.readouterr().err
    assert says in line and never not in line and line.count("\n") == 1


def test_memory_that_torch_cannot_get_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Its allocator raises a RuntimeError, as a fault of ours does."""
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 60)
    assert terminal.exit_code(allocator.value) == 2
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        terminal.exit_code(RuntimeError("The size of tensor a must match the size of tensor b"))


def test_a_module_of_our_own_that_is_missing_is_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError):
        terminal.exit_code(ModuleNotFoundError("No module named 'edgepress.gone'", name="edgepress.gone"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("prune SRC OUT --heal linear", "edgepress heal"),
        ("build SRC OUT --heal linear", "--heal is now --healer"),
        ("bench DIR --beside DIR", "--beside is now --compare-with"),
        ("prune SRC OUT --layers=4,5", "--layers is now --remove-layers"),
        ("prune SRC OUT --foo 1 --layers 4", "--layers is now --remove-layers"),
        ("prune SRC OUT --method gptq", "unrecognized arguments"),
        ("quantize SRC OUT --group 64", "unrecognized arguments"),
    ],
)
def test_former_and_shortened_flags_are_refused(line: str, says: str, call: Callable) -> None:
    result = call(*line.split())
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("run DIR --max-new-tokens 2 Once", "prompt", "Once"),
        ("run DIR --chat Hi", "prompt", "Hi"),
        ("run --chat DIR Hi", "prompt", "Hi"),
        ("build reference --target cpu OUT", "out", Path("OUT")),
        ("bench A --repeats 1 B C", "others", ["B", "C"]),
    ],
)
def test_what_may_be_left_out_may_stand_behind_flags(line: str, name: str, value: object) -> None:
    """Argparse alone takes it for absent when it meets a flag."""
    assert getattr(parser().parse_args(line.split()), name) == value


def test_a_word_too_many_is_one_line_whatever_it_holds(call: Call) -> None:
    result = call("run", "DIR", "--nothing", "\n Once\n\x1b[31m")
    assert result.code == 2 and result.err.count("\n") == 1 and "\x1b" not in result.err


@pytest.mark.parametrize("line", ["run DIR Once --seed 1 more", "run DIR --nothing Once", "show DIR more", "build A B --bits 4 c"])
def test_what_is_too_much_is_refused(line: str, call: Call) -> None:
    result = call(*line.split())
    assert result.code == 2 and result.err.startswith("error: unrecognized arguments") and result.err.count("\n") == 1
    assert f"edgepress {line.split()[0]} --help" in result.err


def test_an_error_is_one_line_whatever_a_name_holds(call: Call) -> None:
    result = call("show", "a\nb\x1b[31m")
    assert result.code == 2 and result.err.count("\n") == 1 and "\x1b" not in result.err


# --- the command line as people write it


@pytest.mark.parametrize(
    "line", ["ONNX PROMPT FLAG", "ONNX FLAG PROMPT", "FLAG ONNX PROMPT", "FLAG ONNX -- PROMPT", "FILE FLAG PROMPT"]
)
def test_flags_stand_anywhere(line: str, call: Call, exported: Path) -> None:
    """Before, between and after folder and prompt; the folder may be given by its model.onnx."""
    parts: dict[str, list[object]] = {"ONNX": [exported], "FILE": [exported / "model.onnx"], "PROMPT": ["Once upon"], "--": ["--"]}
    parts["FLAG"] = ["--max-new-tokens", 3]
    result = call("run", *(part for word in line.split() for part in parts[word]))
    assert result.code == 0, result.err
    assert result.out == greedy(exported, "Once upon", 3)[1].rstrip("\ufffd") + "\n"


def test_artifacts_by_their_file(call: Call, exported: Path) -> None:
    """As file managers complete them."""
    for verb in ("verify", "show"):
        by_file = call(verb, exported / "model.onnx")
        assert by_file.code == 0 and by_file.out == call(verb, exported).out


def test_words_too_many_and_too_few(call: Call) -> None:
    """One line as before, whatever stands where."""
    for arguments, says in (
        (("run", "--seed", 1), "required: DIR"),
        (("run", "a", "b", "--seed", "1", "c"), "unrecognized arguments: c"),
        (("prune", "--remove-count", "1", "a"), "required: OUT"),
        (("build", "a", "--layers", "4", "b"), "--layers is now --remove-layers"),
    ):
        result = call(*arguments)
        assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_is_utf8(encoding: str, exported: Path, tmp_path: Path) -> None:
    """Into a pipe or a file whose encoding is another, as on Windows; also in errors, and for names that are no text."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}

    def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "edgepress.pipeline.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, env=environment, timeout=HUNG)

    done = run("run", exported, "Once → 中é", "--max-new-tokens", "1")
    assert done.returncode == 0 and done.stdout.startswith("Once → 中é".encode())
    done = run("show", tmp_path / "→\udcff")
    assert done.returncode == 2 and "→\\udcff".encode() in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_lead_nowhere(closed: str, exported: Path) -> None:
    """As under some schedulers; a file of the model must not get the number of one."""
    command = f'"{sys.executable}" -m edgepress.pipeline.cli run "{exported}" Once --max-new-tokens 3 {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("Once" in done.stdout) == (not closed.startswith(">"))


def test_a_deleted_current_folder_is_one_line(exported: Path, tmp_path: Path) -> None:
    """Torch would end the process there."""
    command = f'mkdir gone && cd gone && rmdir ../gone && "{sys.executable}" -m edgepress.pipeline.cli show "{exported}"'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has been deleted" in done.stderr
