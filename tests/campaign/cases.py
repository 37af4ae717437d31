"""The kinds of bad input: each spoils a copy of a whole folder and names the command that must meet it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from campaign.bases import TEMPLATE, copy
from campaign.mutations import MARKUP, ODD, Raw, changed, edit_json, edit_metadata, edit_safetensors, put, put_json, spoiled

Argv = list[str]
Kind = Callable[[random.Random, Path, Path], Argv]  # dice, the whole folders, an empty folder -> a command line


def prune(source: Path, place: Path) -> Argv:
    text = str(place.parent / "bases/text.txt")
    out = ["prune", str(source), str(place / "out"), "--remove-layers", "1"]
    return [*out, "--calibration", text, "--calibration-tokens", "128"]


def quantize(source: Path, place: Path) -> Argv:
    return ["quantize", str(source), str(place / "out"), "--method", "rtn", "--group-size", "32"]


def export(source: Path, place: Path) -> Argv:
    return ["export", str(source), str(place / "out"), "--text", str(place.parent / "bases/text.txt"), "--accuracy-level", "0"]


def used(random_: random.Random, folder: Path) -> Argv:
    """An artifact is run, asked or checked."""
    run = ["run", str(folder), "Once upon", "--max-new-tokens", "3"]
    return random_.choice([run, [*run, "--chat"], ["verify", str(folder)], ["show", str(folder)]])


def config(random_: random.Random, bases: Path, place: Path) -> Argv:
    source = copy(bases / "hf", place / "src")
    file, how = source / "config.json", random_.random()
    content = json.loads(file.read_text())
    if how < 0.3:
        sizes = [key for key, value in content.items() if type(value) is int]
        odd = [0, -1, 1, 2, 3, 6, 7, 10**5, 10**7, 2**31, 2**63, 10**30, "5", 5.0, None, True, [5], {}, Raw("1e999"), Raw("NaN")]
        content[random_.choice(sizes)] = random_.choice(odd)
        put_json(file, content)
    elif how < 0.55:
        keys = ("model_type", "architectures", "quantization_config", "rope_parameters", "rope_scaling", "layer_types", "dtype")
        more = ("auto_map", "attn_implementation", "_attn_implementation", "hidden_act", "tie_word_embeddings", "sliding_window")
        words = [
            "gpt2",
            "mamba",
            "t5",
            "bert",
            "qwen2",
            "gemma3_text",
            "phi3",
            ["GPT2LMHeadModel"],
            [1],
            [None],
            "x" * 9999,
            "float16",
        ]
        ropes = [
            {"rope_type": kind, "factor": random_.choice(ODD)} for kind in ("dynamic", "yarn", "longrope", "linear", "x", None)
        ]
        content[random_.choice(keys + more)] = random_.choice([*words, *ropes, *ODD])
        put_json(file, content)
    else:
        edit_json(random_, file)
    return random_.choice([prune, quantize, export])(source, place)


def header(random_: random.Random, bases: Path, place: Path) -> Argv:
    source = copy(bases / "hf", place / "src")
    edit_safetensors(random_, source / "model.safetensors")
    return random_.choice([prune, quantize, export])(source, place)


def index(random_: random.Random, bases: Path, place: Path) -> Argv:
    source = copy(bases / "sharded", place / "src")
    file, shard = source / "model.safetensors.index.json", source / f"model-0000{random_.randint(1, 3)}-of-00003.safetensors"
    how = random_.random()
    if how < 0.35:
        content = json.loads(file.read_text())
        for name in random_.sample(list(content["weight_map"]), random_.choice([1, 5])):
            content["weight_map"][name] = random_.choice(
                ["../x", "/etc/passwd", "", ".", "..", "a\0b", "missing", "config.json", 5, None]
            )
        put_json(file, content)
    elif how < 0.5:
        shard.unlink()
        shard.symlink_to(random_.choice(["/nothing", "/dev/zero", "/dev/null", ".", shard.name, "config.json"]))
    elif how < 0.7:
        edit_safetensors(random_, shard)
    else:
        edit_json(random_, file)
    return random_.choice([prune, quantize, export])(source, place)


def gptq(random_: random.Random, bases: Path, place: Path) -> Argv:
    return _packed_by_others(random_, copy(bases / "gptq", place / "src"), place, ("qweight", "qzeros", "scales", "g_idx"))


def bitsandbytes(random_: random.Random, bases: Path, place: Path) -> Argv:
    return _packed_by_others(random_, copy(bases / "bnb", place / "src"), place, ("weight", "absmax", "quant_map", "__nf4"))


def _packed_by_others(random_: random.Random, source: Path, place: Path, parts: tuple[str, ...]) -> Argv:
    from safetensors.numpy import load_file, save_file

    file, how = source / "model.safetensors", random_.random()
    if how < 0.4:
        edit_json(random_, source / "config.json", ("quantization_config",))
    elif how < 0.85:
        tensors = load_file(file)
        name = random_.choice(
            [name for name in tensors if name.endswith(random_.choice(parts)) and "layers" in name] or list(tensors)
        )
        array, dice = tensors[name], np.random.default_rng(random_.randrange(2**32))
        kinds = (np.int64, np.float32, np.float64, np.uint8, np.int8, np.bool_, np.float16)
        tensors[name] = random_.choice([
            lambda: array[:-1], lambda: np.concatenate([array, array]), lambda: array.reshape(-1), lambda: array[None],
            lambda: array.astype(random_.choice(kinds)), lambda: np.zeros_like(array), lambda: array[..., :0],
            lambda: np.full_like(array, np.iinfo(np.int8).max), lambda: np.array(5, array.dtype), lambda: dice.permutation(array),
            lambda: dice.integers(0, 255, array.shape).astype(array.dtype), lambda: (array * np.nan).astype(array.dtype),
        ])()  # fmt: skip
        if random_.random() < 0.1:
            del tensors[name]
        file.unlink()
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, {"format": "pt"})
    else:
        edit_safetensors(random_, file)
    return export(source, place)


def packed(random_: random.Random, bases: Path, place: Path) -> Argv:
    source = copy(bases / "packed", place / "src")
    (source / "manifest.json").unlink()  # or its sha256 would meet everything
    if random_.random() < 0.6:
        edit_metadata(random_, source / "packed.safetensors", "linears")
    else:
        edit_safetensors(random_, source / "packed.safetensors")
    return export(source, place)


def tokenizer(random_: random.Random, bases: Path, place: Path) -> Argv:
    onnx = random_.random() < 0.7
    source = copy(bases / ("onnx" if onnx else "hf"), place / "src")
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    part = random_.choice([key for key in content if key != "model"] * 3 + ["model"])
    if random_.random() < 0.15:
        put(file, spoiled(random_, file.read_bytes()))
    elif random_.random() < 0.5:
        content[part] = changed(random_, content[part]) if content[part] else random_.choice(ODD)
        put_json(file, content)
    else:
        content[part] = random_.choice([*ODD, *_TOKENIZER_PARTS])
        put_json(file, content)
    return used(random_, source) if onnx else random_.choice([prune, export])(source, place)


_ROW = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_TOKENIZER_PARTS: tuple[object, ...] = (
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Split", "pattern": {"Regex": "(.*)*"}, "behavior": "Isolated", "invert": False},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [], "special_tokens": {}},
    {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},
    {"strategy": {"Fixed": 10**12}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    {"type": "Unigram", "unk_id": 5, "vocab": []}, {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
    {"type": "BPE", "vocab": {"a": 4294967295, "b": 1, "ab": 2}, "merges": ["a b"]}, {"type": "BPE", "vocab": {}, "merges": []},
    [{"id": 4294967295, "content": "Once"} | _ROW], [{"id": 3, "content": ""} | _ROW],
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Fuse"}, {"type": "CTC", "pad_token": "", "cleanup": True},
)  # fmt: skip


def template(random_: random.Random, bases: Path, place: Path) -> Argv:
    """Damaged ones; what a hostile one may do is tests/runtime's."""
    folder = copy(bases / "onnx", place / "src")
    if random_.random() < 0.5:
        put(folder / "chat_template.jinja", spoiled(random_, TEMPLATE.encode()))
    else:
        file = folder / "tokenizer_config.json"
        content = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
        key = random_.choice(["chat_template", "bos_token", "eos_token", "x_token"])
        content[key] = random_.choice([*ODD, [{"name": "default", "template": random_.choice(ODD)}]])
        put_json(file, content)
        if random_.random() < 0.5:
            (folder / "chat_template.jinja").unlink()
    return random_.choice([["verify", str(folder)], ["run", str(folder), "Hi", "--chat", "--max-new-tokens", "2"]])


def manifest(random_: random.Random, bases: Path, place: Path) -> Argv:
    which = random_.choice(["onnx", "packed", "pruned"])
    source = copy(bases / which, place / "src")
    file, how = source / "manifest.json", random_.random()
    if how < 0.3:
        content = json.loads(file.read_text())
        names = ["../x", "/etc/passwd", "..", ".", "", "a\0b", "\ud800", "x\x1b[31m", "A" * 300, "/dev/zero", MARKUP]
        content["files"][random_.choice(names)] = content["files"].pop(random_.choice(list(content["files"])))
        put_json(file, content)
    else:
        edit_json(random_, file)
    if which == "onnx":
        return used(random_, source)
    texts = ["--calibration", str(bases / "text.txt"), "--calibration-tokens", "128", "--healer", "linear"]
    heal = ["heal", str(source), str(place / "out"), "--original", str(bases / "hf"), *texts]
    return random_.choice([["show", str(source)], export(source, place), quantize(source, place), heal])


def generation(random_: random.Random, bases: Path, place: Path) -> Argv:
    folder = copy(bases / "onnx", place / "src")
    names = ["genai_config.json", "genai_config.json", "generation_config.json", "config.json", "tokenizer_config.json"]
    file = folder / random_.choice(names)
    if random_.random() < 0.3:
        content = json.loads(file.read_text())
        inner = content.get("model", content)
        key = random_.choice(["context_length", "decoder", "vocab_size", "eos_token_id"])
        inner[key] = random_.choice([*ODD, -5, 10**12, [[1]], "256"])
        put_json(file, content)
    else:
        edit_json(random_, file)
    return used(random_, folder)
