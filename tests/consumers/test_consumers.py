"""One artifact folder, several consumers, the same greedy tokens: `make test-consumers`, which makes their environments.

edgepress run in an environment of the light base and onnxruntime alone, onnxruntime-genai, and optimum under transformers 4.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
from consumers.programs import LIGHT, by_genai, by_node, by_optimum, light
from edgepress.models import REFERENCE
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import NODE, PLAIN, ExportOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

pytestmark = pytest.mark.consumers
IN_NODE = ("reference", "qwen2")  # a layout that all others read, too
PROMPT, COUNT = "The old house stood at the end of the lane, and", 24
RARE = ("256-767", "2000-4999")  # rows of the head that have 4 bits
MESSAGES = [
    {"role": "user", "content": "Good morning, Zoë."},
    {"role": "assistant", "content": "And to you."},
    {"role": "user", "content": "Thanks"},
]
CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SMALL = {"vocab_size": 5122, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = _SMALL | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "reference": {},
    "llama": _LLAMA | {"rope_parameters": _LLAMA3, "tie_word_embeddings": False},
    "qwen2": _LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
    "gpt2": _SMALL | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
}


def talking(source: Path, folder: Path) -> Path:
    """The checkpoint with the marks of turns as extra special tokens, and a chat template."""
    shutil.copytree(
        source, folder, ignore=lambda _, names: [n for n in names if n.endswith((".md", ".py", ".png", ".txt", ".jsonl"))]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(random_model: Callable, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model without its second layer, one without the attention of the next, at 4 bits.

    In a folder whose name has blanks and letters beyond ASCII.
    """
    found = {}
    for name, settings in MODELS.items():
        folder = tmp_path_factory.mktemp("consumers") / f"{name} à Zürich"
        folder.mkdir()
        source = REFERENCE if not settings else random_model(CONFIG_MAPPING[name](**settings), folder / "source")
        if settings:  # the embedded model has no room in its vocabulary
            source = talking(source, folder / "model")
        made = stages.run("prune", Artifact.load(source), folder / "pruned", PruneOptions(remove_layers=(1,), calibration=text))
        if name == "qwen2":  # a layer without attention has no cache
            parts = PruneOptions(parts="attention", remove_layers=(1,), calibration=text)
            made = stages.run("prune", made, folder / "parts", parts)
        # some matrices of 5 and 6 bits, which each consumer's onnxruntime puts together by itself
        rules = (r".*\.0\..*=5/32", r".*\.1\..*(down_proj|c_proj)=6/32")
        options = QuantizeOptions(method="rtn", group_size=32, rare_rows=RARE, bits_for=rules)
        made = stages.run("quantize", made, folder / "packed", options)
        layout = NODE if name in IN_NODE else PLAIN
        exporting = ExportOptions(text=text, accuracy_level="0" if settings else "4", layout=layout)
        found[name] = stages.run("export", made, folder / "onnx", exporting).path
    return found


@pytest.fixture(scope="module")
def node(
    artifacts: dict[str, Path], prompts: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What transformers.js answers under node, all models in one process. Skipped where there is no node."""
    jobs = [
        {"folder": str(artifacts[name]), "text": PROMPT, "messages": MESSAGES if MODELS[name] else None, "count": COUNT}
        for name in IN_NODE
    ]
    return dict(zip(IN_NODE, by_node(jobs, tmp_path_factory.mktemp("node")), strict=True))


@pytest.fixture(scope="module")
def prompts(artifacts: dict[str, Path]) -> dict[str, list[int]]:
    return {name: load_tokenizer(folder).encode(PROMPT).ids for name, folder in artifacts.items()}


@pytest.fixture(scope="module")
def wanted(artifacts: dict[str, Path], prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """What plain onnxruntime generates."""
    return {name: list(Decoder(folder).greedy(np.array(prompts[name]), COUNT)) for name, folder in artifacts.items()}


@pytest.fixture(scope="module")
def optimum(artifacts: dict[str, Path], prompts: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What optimum and transformers 4 answer, all models in one process."""
    jobs = [
        {
            "folder": str(folder),
            "text": PROMPT,
            "messages": MESSAGES if MODELS[name] else None,
            "ids": prompts[name],
            "count": COUNT,
        }
        for name, folder in artifacts.items()
    ]
    return dict(zip(artifacts, by_optimum(jobs, tmp_path_factory.mktemp("jobs")), strict=True))


@pytest.mark.parametrize("name", IN_NODE)
def test_transformers_js(
    name: str,
    node: dict[str, dict[str, Any]],
    prompts: dict[str, list[int]],
    wanted: dict[str, list[int]],
    artifacts: dict[str, Path],
) -> None:
    """Under node, told nothing but the folder: the same ids, tokens and chat text."""
    ends = [index for index, token in enumerate(wanted[name]) if token == 0]  # min_new_tokens forbids it the end token
    assert node[name]["ids"] == prompts[name]
    assert node[name]["generated"][: ends[0] if ends else COUNT] == wanted[name][: ends[0] if ends else COUNT]
    if MODELS[name]:
        tokenizer = AutoTokenizer.from_pretrained(artifacts[name])
        assert node[name]["chat"] == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_the_light_environment_is_light() -> None:
    """Else the tests beside would prove nothing."""
    code = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'onnx_ir') if u.find_spec(n)])"
    assert subprocess.run([LIGHT, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODELS)
def test_edgepress_run(name: str, artifacts: dict[str, Path], prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """In the light environment."""
    told = light("run", artifacts[name], PROMPT, "--max-new-tokens", COUNT)
    stop = wanted[name].index(0) if 0 in wanted[name] else COUNT
    whole = load_tokenizer(artifacts[name]).decode([*prompts[name], *wanted[name][:stop]])
    assert told.rstrip("\n") == whole.rstrip("\ufffd\n")


@pytest.mark.parametrize("name", MODELS)
def test_verify_and_chat_in_the_light_environment(name: str, artifacts: dict[str, Path]) -> None:
    states = [line.split("  ")[0] for line in light("verify", artifacts[name]).splitlines()]
    assert sorted(states) == ["not checked", *["ok"] * 5]
    if MODELS[name]:
        assert light("run", artifacts[name], "--chat", "--max-new-tokens", 8, said="Good day\nAnd now?\n").strip()


@pytest.mark.parametrize("name", ["reference", "llama", "qwen2"])
def test_genai(name: str, artifacts: dict[str, Path], prompts: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """onnxruntime-genai, for the families that it knows."""
    model = og.Model(str(artifacts[name]))
    found = by_genai(model, prompts[name], COUNT)
    ends = [index for index, token in enumerate(wanted[name]) if token == 0]  # min_length forbids it the end token
    assert found[: ends[0] if ends else COUNT] == wanted[name][: ends[0] if ends else COUNT]
    assert og.Tokenizer(model).encode(PROMPT).tolist() in (prompts[name], prompts[name][1:])  # with BOS or without


def test_tokens_that_genai_guesses(artifacts: dict[str, Path], prompts: dict[str, list[int]], text: Path, tmp_path: Path) -> None:
    """N-gram decoding needs the logits of all positions, and gives the tokens that one after the other gives."""
    source, found = Artifact.load(artifacts["reference"].parent / "packed"), {}
    prompt = prompts["reference"] * 2  # something to look up
    for logits in ("last", "all"):
        options = ExportOptions(text=text, accuracy_level="0", logits=logits)
        found[logits] = og.Model(str(stages.run("export", source, tmp_path / logits, options).path))
    with pytest.raises(RuntimeError, match="logits for every verified token"):
        by_genai(found["last"], prompt, COUNT, ngram_size=3, max_draft_tokens=4)
    assert by_genai(found["all"], prompt, COUNT, ngram_size=3, max_draft_tokens=4) == by_genai(found["last"], prompt, COUNT)


def test_a_cache_of_int8(artifacts: dict[str, Path], prompts: dict[str, list[int]], text: Path, tmp_path: Path) -> None:
    """In edgepress' light environment and in onnxruntime-genai, which makes the cache of the type that the graph says."""
    options = ExportOptions(text=text, accuracy_level="0", cache="int8")
    folder = stages.run("export", Artifact.load(artifacts["reference"].parent / "packed"), tmp_path / "int8", options).path
    decoder, prompt = Decoder(folder), prompts["reference"]
    wanted = list(decoder.greedy(np.array(prompt), COUNT))
    assert decoder.cached()["past_key_values.0.key"].dtype == np.int8
    end = [*wanted, 0].index(0)  # GenAI may not stop there
    assert by_genai(og.Model(str(folder)), prompt, COUNT)[:end] == wanted[:end]
    assert light("run", folder, PROMPT, "--max-new-tokens", COUNT).strip()


@pytest.mark.parametrize("name", MODELS)
def test_optimum(name: str, optimum: dict[str, Any], wanted: dict[str, list[int]]) -> None:
    """ORTModelForCausalLM of optimum-onnx."""
    ends = [index for index, token in enumerate(wanted[name]) if token == 0]  # min_new_tokens forbids it the end token
    assert optimum[name]["transformers"].startswith("4.")
    assert optimum[name]["generated"][: ends[0] if ends else COUNT] == wanted[name][: ends[0] if ends else COUNT]


@pytest.mark.parametrize("name", MODELS)
def test_both_versions_read_the_same(name: str, artifacts: dict[str, Path], optimum: dict[str, Any]) -> None:
    """Tokenizer, special tokens, chat template and config of the same folder under transformers 4 and 5."""
    folder, older = artifacts[name], optimum[name]
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert older["tokenizer"] == ("Qwen2TokenizerFast" if name == "qwen2" else "PreTrainedTokenizerFast")
    ids = tokenizer(PROMPT)["input_ids"]
    assert older["ids"] == ids == load_tokenizer(folder).encode(PROMPT).ids
    assert older["text"] == PROMPT == tokenizer.decode(ids, skip_special_tokens=True)
    assert set(older["special"]) == set(tokenizer.all_special_tokens)
    assert older["layers"] == config.num_hidden_layers == (15 if name == "reference" else 3 if name != "gpt2" else 2)
    assert older["dtype"] == str(config.dtype).removeprefix("torch.")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    assert older["rope_theta"] == rope.pop("rope_theta", None)
    assert older["rope_scaling"] == (None if rope.get("rope_type", "default") == "default" else rope)
    if MODELS[name]:
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert older["chat"] == text and text.count("<|im_start|>") == 4
        assert load_tokenizer(folder).encode("<|im_end|>", add_special_tokens=False).ids == [
            tokenizer.convert_tokens_to_ids("<|im_end|>")
        ]
