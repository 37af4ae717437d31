"""The programs that read an artifact, each in its own environment: what they answer to a list of jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from patience import HUNG

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
LIGHT, OPTIMUM = (ROOT / name / "bin" / "python" for name in (".venv-light", ".venv-optimum"))
NODE_MODULES = ROOT / ".node-consumer" / "node_modules"
Answers = list[dict[str, Any]]


def light(*arguments: object, said: str = "") -> str:
    """What the command line prints where torch, transformers and onnx are not installed."""
    assert LIGHT.is_file(), "run make test-consumers, which makes the environment"
    command = [str(LIGHT), "-m", "edgepress.pipeline.cli", *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONUTF8": "1"}
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=HUNG, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_genai(model: og.Model, prompt: list[int], count: int, **guessing: int) -> list[int]:
    """Greedy tokens of onnxruntime-genai. guessing: settings of n-gram decoding."""
    parameters = og.GeneratorParams(model)
    if guessing:
        parameters.set_speculative_options(**guessing)
    length = len(prompt) + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def by_optimum(jobs: Answers, scratch: Path) -> Answers:
    """What optimum and transformers 4 answer (optimum_side.py)."""
    assert OPTIMUM.is_file(), "run make test-consumers, which makes the environment"
    return _answers([str(OPTIMUM), str(HERE / "optimum_side.py")], jobs, scratch)


def by_node(jobs: Answers, scratch: Path) -> Answers:
    """What transformers.js answers under node (node_side.mjs). Skips where there is no node."""
    return _answers(["node", str(_beside_modules("node_side.mjs"))], jobs, scratch)


def by_browser(jobs: Answers, scratch: Path) -> Answers:
    """What Chromium makes of them (browser_side.mjs). Skips where it or node is not installed."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    content = {"chromium": chromium, "modules": str(node_modules()), "jobs": jobs}
    return _answers(["node", str(_beside_modules("browser_side.mjs"))], content, scratch)


def node_modules() -> Path:
    """Where npm installed transformers.js. Skips without node and npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed, which transformers.js needs")
    assert NODE_MODULES.is_dir(), "run make test-consumers, which installs transformers.js"
    return NODE_MODULES


def _beside_modules(script: str) -> Path:
    """A copy where node finds the packages that it imports."""
    return Path(shutil.copy(HERE / script, node_modules().parent))


def _answers(command: list[str], jobs: object, scratch: Path) -> Answers:
    file = scratch / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=HUNG, cwd=scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: Answers = json.loads(done.stdout.splitlines()[-1])
    return answers
