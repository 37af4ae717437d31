"""One folder for everything: an artifact for browsers in seven programs, and the pages that chat with it. `make test-consumers`.

Of the embedded model, and of SmolLM2-135M-Instruct where that can be fetched. What needs node or Chromium is skipped without.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from consumers.programs import by_browser, by_genai, by_node, by_optimum, node_modules
from edgepress.models import REFERENCE
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.fetch import fetch
from edgepress.pipeline.options import WEB, ExportOptions, ImportOptions, PageOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer

pytestmark = pytest.mark.consumers
PROMPT, COUNT = "The old house stood at the end of the lane, and", 64
# The embedded model is no chat model: it goes on until its context is full.
QUESTIONS = {"reference": ["Once upon a time"], "smollm2": ["What is the capital of France?", "And of Italy?"]}
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=QUESTIONS)
def artifact(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp(request.param)
    source = Artifact.load(REFERENCE)
    if request.param != "reference":
        try:
            source = stages.run("import", Artifact.load(fetch(request.param)), folder / "model", ImportOptions())
        except InputError as error:
            pytest.skip(str(error))
    packed = stages.run("quantize", source, folder / "packed", QuantizeOptions(method="rtn", bits=8, group_size=-1))
    return stages.run("export", packed, folder / request.param, ExportOptions(text=text, target=WEB))


@pytest.fixture(scope="module")
def prompt(artifact: Artifact) -> list[int]:
    return load_tokenizer(artifact.path).encode(PROMPT).ids


@pytest.fixture(scope="module")
def wanted(artifact: Artifact, prompt: list[int]) -> list[int]:
    """What plain onnxruntime generates, up to an end, which other programs are forbidden."""
    tokens = list(Decoder(artifact.path).greedy(np.array(prompt), COUNT))
    return tokens[: [*tokens, 0].index(0)]


@pytest.fixture(scope="module")
def served(artifact: Artifact) -> Iterator[str]:
    """The address of `edgepress serve`."""
    command = [sys.executable, "-m", "edgepress.pipeline.cli", "serve", str(artifact.path), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "http://" in line)
        match = re.search(r"http://[\w.:]+", line)
        assert match
        yield match[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def chromium(artifact: Artifact, served: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What a browser makes of the folder, of its page, and of the server's page."""
    scratch, questions = tmp_path_factory.mktemp("browser"), QUESTIONS[artifact.path.name]
    page = stages.run("page", artifact, scratch / "page", PageOptions(title="here", modules=str(node_modules())))
    jobs = {
        "tokens": {"folder": str(artifact.path), "text": PROMPT, "count": COUNT},
        "page": {"folder": str(page.path), "questions": questions},
        "server": {"address": served, "questions": questions},
    }
    return dict(zip(jobs, by_browser(list(jobs.values()), scratch), strict=True))


def test_genai(artifact: Artifact, prompt: list[int], wanted: list[int]) -> None:
    assert by_genai(og.Model(str(artifact.path)), prompt, COUNT)[: len(wanted)] == wanted


def test_optimum(artifact: Artifact, prompt: list[int], wanted: list[int], tmp_path: Path) -> None:
    job = {"folder": str(artifact.path), "text": PROMPT, "messages": None, "ids": prompt, "count": COUNT}
    (answer,) = by_optimum([job], tmp_path)
    assert answer["generated"][: len(wanted)] == wanted


def test_transformers_js_under_node(artifact: Artifact, prompt: list[int], wanted: list[int], tmp_path: Path) -> None:
    (answer,) = by_node([{"folder": str(artifact.path), "text": PROMPT, "messages": None, "count": COUNT}], tmp_path)
    assert answer["ids"] == prompt and answer["generated"][: len(wanted)] == wanted


def test_transformers_js_in_chromium(chromium: Answers, wanted: list[int]) -> None:
    assert chromium["tokens"]["generated"][: len(wanted)] == wanted


def test_serve(artifact: Artifact, served: str, wanted: list[int]) -> None:
    body = {"prompt": PROMPT, "max_tokens": len(wanted), "temperature": 0}
    request = urllib.request.Request(f"{served}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        told = json.load(response)["choices"][0]["text"]
    tokenizer = load_tokenizer(artifact.path)
    ids = tokenizer.encode(PROMPT).ids
    assert told == tokenizer.decode([*ids, *wanted]).removeprefix(tokenizer.decode(ids))


@pytest.mark.parametrize("page", ["page", "server"])
def test_the_page_answers(page: str, artifact: Artifact, chromium: Answers) -> None:
    """The page of the folder also without a network, once it was visited."""
    found = chromium[page]
    assert not found["errors"] and found["widths"] == [360, 1366]  # nothing stands out to the side
    assert found["isolated"] == (page == "page")
    answers = [*found["answers"], *([found["offline"]] if page == "page" else [])]
    assert found["title"] == ("here" if page == "page" else artifact.path.name)
    if artifact.path.name == "reference" and page == "server":
        assert "no chat template" in answers[0]
        return
    for answer in answers:
        assert "tokens/s" in answer or "cut at" in answer, answer
    assert "stopped" in found["stopped"]["answer"]
    assert len(found["stopped"]["answer"]) < found["stopped"]["begun"] + 400  # where each would go on for a thousand and more
    if artifact.path.name == "smollm2":
        assert "Paris" in answers[0] and "Rome" in answers[1] and "Paris" in answers[-1 if page == "page" else 0]
