"""Quantize jobs, real runs of gptqmodel and trained models, for the tests of quantizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import isolated
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.plan import WINDOW
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.stages import run
from edgepress.pipeline.text.windows import text_windows
from patience import HUNG
from safetensors.numpy import load_file


def matrices(folder: Path) -> dict[str, np.ndarray]:
    """The block matrices of a one-file Llama checkpoint, read without edgepress."""
    found = load_file(folder / "model.safetensors")
    return {n.removesuffix(".weight"): w for n, w in found.items() if n.endswith("_proj.weight")}


def no_windows() -> list[np.ndarray]:
    raise AssertionError("this quantizer needs no calibration")


def job_of(folder: Path, windows: Callable[[], list[np.ndarray]] = no_windows, **options: Any) -> QuantizeJob:
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices(folder).items()}
    scratch = folder.with_name(f"{folder.name}-scratch")
    return QuantizeJob(Checkpoint(folder), shapes, windows, QuantizeOptions(**options), scratch)


@dataclass
class Trained:
    """A trained model whose block matrices can be replaced, and its perplexity on a text."""

    folder: Path
    windows: list[np.ndarray]

    def __post_init__(self) -> None:
        self.model = load_model(self.folder)
        self.linears = block_linears(self.model)
        self.weights = {name: module.weight.detach().numpy().copy() for name, module in self.linears.items()}

    def perplexity(self, replace: dict[str, PackedLinear] | None = None) -> float:
        """Over all windows, with other matrices in the blocks when given."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so small a model gains nothing by more, and loses ten times on a busy machine
        with torch.inference_mode():
            for name, module in self.linears.items():
                weight = replace[name].dequantized() if replace else self.weights[name]
                module.weight.copy_(torch.from_numpy(weight))
            ids = [torch.from_numpy(row)[None] for row in self.windows]
            losses = [self._losses(rows) for rows in ids]
        torch.set_num_threads(threads)
        return float(torch.cat(losses).double().mean().exp())

    def _losses(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=rows, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")

    def rounded(self, bits: int, group: int, symmetric: bool = False) -> dict[str, PackedLinear]:
        """Every matrix rounded to nearest."""
        return {name: round_to_nearest(name, w, bits, group, symmetric) for name, w in self.weights.items()}


DEQUANTIZE = """
import sys
import numpy as np, torch
from gptqmodel import BACKEND, GPTQModel

model = GPTQModel.load(sys.argv[1], backend=BACKEND.TORCH, dtype=torch.float16, device="cpu")  # its kernel takes no float32
found = {}
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        module.scales.data = module.scales.data.float()  # so that the product is float32, as ours is
        found[name] = module.dequantize_weight().T.detach().numpy()
np.savez(sys.argv[2], **found)
"""


@dataclass(frozen=True)
class GptqRun:
    """scratch: what gptqmodel wrote; cwd: the working directory meanwhile; packed: what the stage made of it."""

    source: Path
    scratch: Path
    cwd: Path
    packed: Artifact
    windows: list[np.ndarray]

    @property
    def linears(self) -> dict[str, PackedLinear]:
        """What ships."""
        file = PackedFile(self.packed.path)
        return {name: file[name] for name in matrices(self.source)}

    def raw(self) -> dict[str, np.ndarray]:
        """The tensors that gptqmodel wrote."""
        return {k: v for shard in (self.scratch / "model").glob("*.safetensors") for k, v in load_file(shard).items()}

    def dequantized(self) -> dict[str, np.ndarray]:
        """Weights restored by gptqmodel itself, in a process of its own."""
        command = [sys.executable, "-c", DEQUANTIZE, str(self.scratch / "model"), str(self.scratch / "weights.npz")]
        subprocess.run(command, check=True, capture_output=True, timeout=HUNG, cwd=self.scratch)
        with np.load(self.scratch / "weights.npz") as arrays:
            return dict(arrays)


def hostile(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose tokenizer brings code. Code that runs, here or in ``folder``/cwd, leaves the file RAN."""
    shutil.copytree(source, folder / "source")
    code = f"import pathlib; pathlib.Path({str(folder / 'RAN')!r}).write_text(__name__)\n"
    (folder / "source" / "own.py").write_text(
        code + "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    settings = folder / "source" / "tokenizer_config.json"
    brought = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | brought))
    (folder / "cwd").mkdir()
    for module in ("numpy", "torch", "transformers", "gptqmodel", "json"):
        (folder / "cwd" / f"{module}.py").write_text(code)
    return folder / "source"


def run_gptqmodel(source: Path, folder: Path, text: Path, **options: Any) -> GptqRun:
    folder.mkdir(exist_ok=True)
    cwd, scratch = folder / "cwd", folder / "out" / ".packed.gptqmodel"  # from which a relative path leads elsewhere
    cwd.mkdir(exist_ok=True)
    settings = QuantizeOptions(method="gptqmodel", calibration=text, **{"calibration_tokens": 2048, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(isolated, "remove", lambda _: None)
        packed = run("quantize", Artifact.load(Path(os.path.relpath(source, cwd))), folder / "out" / "packed", settings)
    return GptqRun(
        source, scratch, cwd, packed, text_windows(text, source, budget=settings.calibration_tokens, length=WINDOW, shortest=16)
    )
