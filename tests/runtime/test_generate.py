"""Text from an artifact in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError, OptionError, TextError
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.options import ExportOptions, RunOptions
from edgepress.pipeline.runtime.chat import Conversation
from edgepress.pipeline.runtime.generate import TextModel, stream
from families import TINY
from manifests import recorded
from patience import HUNG
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

PROMPT = "The old house stood"


@pytest.fixture(scope="module")
def folder(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "onnx"
    return stages.run("export", Artifact.load(tiny), out, ExportOptions(text=text)).path


def test_one_model_continues_several_prompts(folder: Path) -> None:
    """Each from its beginning: nothing of a former one is left in the cache, finished or not."""
    model = TextModel(folder)
    first = list(model.stream(PROMPT, 12))
    next(model.stream("Another text", 12))
    assert list(model.stream(PROMPT, 12)) == first and 0 < len(first) <= 12
    assert list(model.stream(PROMPT, 12, temperature=0.8, seed=1)) == list(model.stream(PROMPT, 12, temperature=0.8, seed=1))


def test_the_command_line_streams_the_same(folder: Path) -> None:
    """After the prompt, which a terminal shows too."""
    pieces = list(stream(folder, PROMPT, RunOptions(max_new_tokens=12)))
    assert pieces == [PROMPT, *TextModel(folder, threads=1).stream(PROMPT, 12)]


def test_errors_come_before_the_first_piece(folder: Path, tmp_path: Path) -> None:
    model = TextModel(folder)
    with pytest.raises(TextError, match="prompt is empty"):
        model.stream("")
    with pytest.raises(OptionError, match="exceed the context of 256"):
        model.stream(PROMPT, max_new_tokens=256)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        TextModel(tmp_path)


def extended(source: Path, target: Path, *tokens: str) -> Path:
    """A copy whose tokenizer knows tokens for which the embedding has no row."""
    shutil.copytree(source, target)
    content = read_json(target / "tokenizer.json")
    for number, token in enumerate(tokens):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": TINY["vocab_size"] + number, "content": token, "special": True} | flags)
    write_json(target / "tokenizer.json", content)
    recorded(target, "tokenizer.json")
    return target


def test_a_token_beyond_the_embedding_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    copy = extended(folder, tmp_path / "copy", "<pad>", "<turn>")
    (copy / "chat_template.jinja").write_text("{% for m in messages %}<turn>{{ m.content }}{% endfor %}")
    with pytest.raises(TextError, match=r"the prompt has the token '<pad>', number 5120, beyond the 5120 rows"):
        TextModel(copy).stream("One <pad> and")
    with pytest.raises(TextError, match="the conversation has the token '<turn>', number 5121"):
        next(Conversation(copy, RunOptions()).answer("Hello"))
    assert list(TextModel(copy).stream(PROMPT, 12)) == list(TextModel(folder).stream(PROMPT, 12))


@pytest.mark.parametrize("ends", [[5, 17], 5, None])
def test_ends_and_unknown_tokens_as_in_transformers(
    ends: list[int] | int | None, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Several end tokens or none; a vocabulary larger than the tokenizer, whose last rows no text can name."""
    size = TINY["vocab_size"] + 512
    source = random_model(
        LlamaConfig(**TINY | {"vocab_size": size, "eos_token_id": None}, tie_word_embeddings=False), tmp_path / "model"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    free = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    if ends is not None:  # those that it comes by
        ends = [free[9], size - 1] if isinstance(ends, list) else free[9]
    write_json(source / "generation_config.json", {"eos_token_id": ends} if ends is not None else {})
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
    artifact = stages.run("export", Artifact.load(source), tmp_path / "onnx", ExportOptions(text=text, accuracy_level="0"))
    stop = TextModel(artifact.path).stop
    assert stop == (set() if ends is None else set(ends) if isinstance(ends, list) else {ends})
    whole = tokenizer.decode([*ids[0].tolist(), *(id for id in expected if id not in stop)], skip_special_tokens=True)
    assert PROMPT + "".join(TextModel(artifact.path).stream(PROMPT, 24)) == whole.rstrip("\ufffd")


def test_nothing_is_reported_to_anybody(folder: Path, tmp_path: Path) -> None:
    """Left to itself onnxruntime keeps a device id in the user's cache folder, and a database of what it will send."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    command = [sys.executable, "-m", "edgepress.pipeline.cli", "run", str(folder), "Once", "--max-new-tokens", "2"]
    subprocess.run(command, env=kept | {"HOME": str(tmp_path)}, check=True, capture_output=True, timeout=HUNG)
    assert not list(tmp_path.rglob("*icrosoft*"))
