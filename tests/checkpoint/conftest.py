"""Folders quantized by other libraries, written once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HUNG
from third_party import BNB, WRITE
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def source(tiny: Path, random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float checkpoint that all are made from."""
    config = LlamaConfig.from_pretrained(tiny, num_hidden_layers=2)
    return random_model(config, tmp_path_factory.mktemp("foreign") / "float")


@pytest.fixture(scope="session")
def written(source: Path, text: Path, once: Callable[..., Path]) -> Path:
    """A folder of GPTQ folders."""

    def write(out: Path) -> None:
        command = [sys.executable, "-c", WRITE, *map(str, (source, text, out))]
        environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HUNG)
        assert done.returncode == 0, done.stderr[-2000:]

    return once("gptq", write)


@pytest.fixture(scope="session")
def bitsandbytes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A folder of bitsandbytes folders, and the weights as bitsandbytes restored them before any forward."""
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    out, truth = tmp_path_factory.mktemp("bnb"), {}
    for name, settings in BNB.items():
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32, device_map="cpu"
        )
        truth[name] = {}
        for module, layer in model.named_modules():
            if type(layer).__name__ == "Linear4bit":
                state, shape = layer.weight.quant_state, layer.weight.quant_state.shape
                absmax = state.absmax
                if state.nested:
                    absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
                # as one row: see bitsandbytes_4bit in tests/quantize/test_bnb.py
                flat = functional.QuantState(
                    absmax, torch.Size([shape.numel()]), state.code, state.blocksize, state.quant_type, torch.float32
                )
                truth[name][module] = functional.dequantize_4bit(layer.weight.data, flat).reshape(shape).numpy()
            elif type(layer).__name__ == "Linear8bitLt":
                scales = layer.weight.SCB.numpy()[:, None] / np.float32(127)
                truth[name][module] = layer.weight.data.numpy().astype(np.float32) * scales
        model.save_pretrained(out / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(out / name)
    return out, truth
