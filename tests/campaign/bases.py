"""The whole folders that a campaign damages copies of: one of every format, of a model of four tiny layers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gptq_words import checkpoint_tensors
from made_up import PRUNED, WHOLE, content_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPE = {
    "prune": {"remove_layers": [1], "calibration_tokens": 128},
    "quantize": {"method": "rtn", "bits": 4, "group_size": 32},
    "export": {"target": "cpu", "accuracy_level": "0"},
}


def make(folder: Path) -> None:
    """hf, sharded, gptq, bnb, pruned, packed, onnx (with a chat template) and report; text.txt, words.jsonl."""
    from edgepress.models import EVALUATION_TEXT, REFERENCE
    from edgepress.pipeline import recipe
    from edgepress.pipeline.report import files
    from families import TINY
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hf = folder / "hf"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(hf)
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(hf)
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    text = EVALUATION_TEXT.read_text()[:12000]
    (folder / "text.txt").write_text(text)
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")))
    _shard(hf, folder / "sharded")
    _quantized(hf, folder / "gptq", _gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"})
    _quantized(hf, folder / "bnb", _bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    texts = {"calibration": str(folder / "text.txt"), "text": str(folder / "text.txt")}
    recipe.build(hf, folder / "built", recipe.plan(RECIPE, texts))
    for built, name in (("01-prune", "pruned"), ("02-quantize", "packed"), ("03-export", "onnx")):
        os.rename(folder / "built" / built, folder / name)
    (folder / "report").mkdir()
    files.write(content_of(PRUNED, WHOLE), folder / "report")


def copy(base: Path, to: Path) -> Path:
    """A copy whose large files are links, for a case replaces what it changes."""
    to.mkdir(parents=True)
    for file in base.iterdir():
        if file.stat().st_size > 200_000:
            os.link(file, to / file.name)
        else:
            shutil.copy(file, to / file.name)
    return to


def _shard(source: Path, out: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, where = load_file(source / "model.safetensors"), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::3]}
        save_file(part, out / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _quantized(source: Path, out: Path, pack: Callable[..., dict[str, np.ndarray]], settings: dict[str, object]) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        packed = pack(module, weight) if module.endswith(LINEARS) else {name: weight}
        tensors |= {key: np.ascontiguousarray(array) for key, array in packed.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config))


def _gptq(module: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // 32, 32)
    scales = np.abs(groups).max(-1) / 7 + 1e-6
    codes = np.clip(np.round(groups / scales[..., None]) + 8, 0, 15).astype(np.uint8).reshape(rows, columns)
    parts = checkpoint_tensors(codes, np.full(scales.shape, 8, np.uint8), scales, 4, 32, "gptq")
    return {f"{module}.{part}": array for part, array in parts.items()}


def _bnb(module: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    from edgepress.pipeline.checkpoint.packed import CODEBOOKS

    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(-1).astype(np.float32) + np.float32(1e-6)
    codes = np.abs(blocks[..., None] / absmax[:, None, None] - CODEBOOKS["nf4"]).argmin(-1).astype(np.uint8).reshape(-1)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)})
    return {
        f"{module}.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        f"{module}.weight.absmax": absmax,
        f"{module}.weight.quant_map": CODEBOOKS["nf4"],
        f"{module}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }
