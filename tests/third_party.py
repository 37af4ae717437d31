"""Folders quantized by gptqmodel, optimum, and transformers with bitsandbytes, for the tests of their readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Each writer in its own way; gptqmodel wants a process of its own. Labels and layouts are the writers'.
WRITE = """
import json, os, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum.gptq import GPTQQuantizer
from gptqmodel import GPTQModel, QuantizeConfig

source, text, out = sys.argv[1:]
os.chdir(out)
words = open(text).read()
pieces = [words[i : i + 600] for i in range(0, 4800, 600)]
tokenizer = AutoTokenizer.from_pretrained(source)
for name, sym, desc in (("optimum-act-order", False, True), ("optimum-symmetric", True, False)):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    quantizer = GPTQQuantizer(4, pieces, group_size=32, desc_act=desc, act_group_aware=False, sym=sym, model_seqlen=128)
    quantizer.save(quantizer.quantize_model(model, tokenizer), f"{out}/{name}")
    tokenizer.save_pretrained(f"{out}/{name}")
CASES = ("gptqmodel-act-order", 4, 64, True, "gptq"), ("gptqmodel-8-bits-v2", 8, -1, False, "gptq_v2")
for name, bits, group, desc, format in CASES:
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, desc_act=desc, act_group_aware=False, format=format,
                            pack_impl="original", offload_to_disk_path=f"{out}/offload")
    model = GPTQModel.load(source, config, dtype=torch.float32, device="cpu")
    rows = [tokenizer(piece)["input_ids"] for piece in pieces]
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(f"{out}/{name}")
"""
V1 = ("optimum-symmetric", "gptqmodel-act-order")  # optimum writes symmetric zero points as v1 and others as v2
GPTQ = ("optimum-act-order", "optimum-symmetric", "gptqmodel-act-order", "gptqmodel-8-bits-v2")
BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def copied(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], Any] | None = None, **settings: Any) -> Path:
    """A copy of a GPTQ folder in one file, its arrays or its settings changed."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = arrays(folder)
    if change:
        change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in (target / "config.json", target / "quantize_config.json"):
        content = json.loads(file.read_text())
        (content if file.name == "quantize_config.json" else content["quantization_config"]).update(settings)
        file.write_text(json.dumps(content))
    return target
