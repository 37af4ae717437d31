"""Fixtures: the embedded model, tiny random models built on the spot, the command line, and the shared models where they are."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from edgepress.models import EVALUATION_TEXT, REFERENCE
from edgepress.pipeline.checkpoint.load import quiet
from edgepress.pipeline.files import remove
from edgepress.pipeline.registry import load
from families import TINY
from filelock import FileLock
from patience import HUNG
from refusal import Refused, check_refusal, tree
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

# Two workers with a thread each: more threads than cores, spinning at barriers, made these tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Begun first: the last file to begin leaves the other worker idle until it ends, and the rest are short.
LONGEST = (
    "test_chain.py", "test_stages.py", "exporters/test_stage.py", "test_gptqmodel.py", "test_gptq.py", "test_linear.py",
    "tune/test_stage.py",
)  # fmt: skip

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that have not begun after so many minutes")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"not begun within {minutes:g} minutes")


def pytest_collection_finish() -> None:
    """A collection of garbage, of which stages make many, then skips the million objects that imports have left."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    place = {path: number for number, path in enumerate(LONGEST)}
    items.sort(key=lambda item: min((place[end] for end in LONGEST if str(item.path).endswith(f"/{end}")), default=len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def without_a_process_of_its_own() -> Iterator[None]:
    """What edgepress isolates for its memory alone runs here: a process takes seconds to import what this one has.

    What patches libraries keeps its process, and so has whatever runs the command line or asks for ``isolation``.
    """
    stage = importlib.import_module("edgepress.pipeline.quantize.stage")
    isolated = stage.run_isolated

    def here(function: str, arguments: tuple[object, ...], label: str, scratch: Path) -> object:
        if label not in ("gptq", "choosing the bits"):
            return isolated(function, arguments, label, scratch)
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        result = pickle.loads(pickle.dumps(load(function)(*arguments)))
        remove(scratch)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_isolated", here)
        yield


@pytest.fixture
def isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolated work in a process of its own, as edgepress does it."""
    stage = importlib.import_module("edgepress.pipeline.quantize.stage")
    monkeypatch.setattr(stage, "run_isolated", importlib.import_module("edgepress.pipeline.quantize.isolated").run_isolated)


@pytest.fixture(scope="session")
def text() -> Path:
    """Prose that no model was trained on."""
    return EVALUATION_TEXT


@pytest.fixture(scope="session")
def reference() -> Path:
    """The embedded, trained model."""
    return REFERENCE


@pytest.fixture(scope="session")
def tinystories() -> Path:
    return _shared("data/tinystories-val/tinystories_val.txt")


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], Path]:
    return lambda name: _shared(f"models/{name}")


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the shared models and texts are no part of the repository")
    return path


def save_random(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a config with the reference tokenizer; weights large enough that blocks differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet():  # tests look at what stands on stderr
        model.to(dtype).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with untied head; 96 is no multiple of the group sizes 64 and 128."""
    return save_random(LlamaConfig(**TINY, tie_word_embeddings=False), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Path]:
    return save_random


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that the first worker to ask for it fills, for all of them to read."""

    def shared(name: str, fill: Callable[[Path], object]) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                (part := folder.with_suffix(".part")).mkdir(exist_ok=True)  # there after a fill that failed
                fill(part)
                part.rename(folder)
        return folder

    return shared


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def edgepress() -> Callable[..., Result]:
    """Run the command line in a process of its own."""

    def run(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Result:
        command = [sys.executable, "-m", "edgepress.pipeline.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | (env or {}), timeout=HUNG)
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process: fast, for what goes wrong before the work begins."""
    from edgepress.pipeline.cli import main

    def run(*arguments: object) -> Result:
        capsys.readouterr()  # what earlier stages of the test said is not this call's
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model folder with some config keys changed."""

    def copy(source: Path, name: str = "model", **changes: object) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (target / file.name).write_bytes(file.read_bytes())
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, **changes}))
        return target

    return copy


@pytest.fixture
def refused(call: Callable[..., Result], tmp_path: Path) -> Refused:
    """Run a command; assert exit code 2, one error line with all of ``says`` and advice, and not one file touched or left."""

    def check(*arguments: object, says: tuple[str, ...] | str) -> None:
        before = tree(tmp_path)
        result = call(*arguments)
        check_refusal(result.code, result.err, (says,) if isinstance(says, str) else says)
        assert tree(tmp_path) == before

    return check
