"""Time and peak memory of the quantize stage by gptq and by gptqmodel, on random models of real shapes.

    python benchmarks/gptq_cost.py [--shape 135m --shape 1b --shape 3b --shape 7b] [--method gptq --method gptqmodel]
        [--tokens 4096 --memory 6 --work out/gptq-cost]

Each in a fresh process, in turn. Memory is the proportional set size (PSS) of the whole process tree, sampled every 250 ms, at its
peak. --memory: GB that a process may have at most (RLIMIT_DATA: the kernel refuses what it allocates beyond, mapped files aside).
Models are written layer by layer, bfloat16, and kept in --work.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from edgepress.models import REFERENCE
from edgepress.pipeline.files import write_json
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

# Of SmolLM2-135M, Llama-3.2-1B and 3B, and Llama-2-7B.
SHAPES = {
    "135m": (49152, 576, 1536, 30, 9, 3, True),
    "1b": (128256, 2048, 8192, 16, 32, 8, True),
    "3b": (128256, 3072, 8192, 28, 24, 8, True),
    "7b": (32000, 4096, 11008, 32, 32, 32, False),
}
STAGE = """
import sys
from pathlib import Path
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
source, out, tokens, method = sys.argv[1:]
options = QuantizeOptions(method=method, bits=4, group_size=64, calibration=CALIBRATION_TEXT, calibration_tokens=int(tokens))
run("quantize", Artifact.load(Path(source)), Path(out), options)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="any number of them (default: 135m)")
    parser.add_argument("--method", action="append", choices=("gptq", "gptqmodel"), help="(default: gptq)")
    parser.add_argument("--tokens", type=int, default=16384, help="of the shipped text, which has 9,000 (default: all)")
    parser.add_argument("--memory", type=float, help="GB that a process may allocate (default: no limit)")
    parser.add_argument("--work", type=Path, default=Path("out/gptq-cost"))
    options = parser.parse_args()
    options.work = options.work.resolve()  # the process stands elsewhere
    print("| shape | method | minutes | CPU minutes | peak, GB |\n| --- | --- | ---: | ---: | ---: |")
    for shape in options.shape or ["135m"]:
        source = model(options.work / shape, shape)
        for method in options.method or ["gptq"]:
            out = options.work / f"{shape}-{method}"
            for left in (out, out.with_name(f".{out.name}.{method}")):
                shutil.rmtree(left, ignore_errors=True)
            command = [sys.executable, "-c", STAGE, *map(str, (source, out, options.tokens, method))]
            wall, cpu, peak, _ = measured(command, options.work, options.memory)
            print(f"| {shape} | {method} | {wall / 60:.1f} | {cpu / 60:.1f} | {peak / 1e9:.2f} |", flush=True)


def model(folder: Path, shape: str) -> Path:
    """Random weights of a shape; the vocabulary of the reference tokenizer is the first part of its own."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, hidden, wide, layers, heads, kv, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, max_position_embeddings=4096, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    head = hidden // heads
    of_layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv * head, hidden), "self_attn.v_proj": (kv * head, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    parts = {"outside": {"model.embed_tokens": (vocabulary, hidden), **({} if tied else {"lm_head": (vocabulary, hidden)})}}
    parts |= {f"{layer:02d}": {f"model.layers.{layer}.{name}": size for name, size in of_layer.items()} for layer in range(layers)}
    generator, places = torch.Generator().manual_seed(0), dict[str, str]()
    for part, matrices in parts.items():
        inside = [f"model.layers.{part.lstrip('0') or 0}.{name}_layernorm" for name in ("input", "post_attention")]
        norms = ["model.norm"] if part == "outside" else inside
        tensors = {f"{name}.weight": 0.02 * torch.randn(size, generator=generator) for name, size in matrices.items()}
        tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
        file = f"model-{part}.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def measured(command: list[str], cwd: Path, memory: float | None) -> tuple[float, float, int, int]:
    """Seconds, CPU seconds, peak bytes and those of no file, of the process and all below it. memory: GB that each may allocate."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 1e9),) * 2)

    begun, before, peak, anonymous = time.monotonic(), os.times(), 0, 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=cwd, preexec_fn=limit, **quiet) as process:
        while process.poll() is None:
            whole, of_no_file = map(sum, zip(*map(pss, tree(process.pid)), strict=True))
            peak, anonymous = max(peak, whole), max(anonymous, of_no_file)
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"failed: {command[-4:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begun, cpu, peak, anonymous


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in tree(child))]


def pss(pid: int) -> tuple[int, int]:
    """Proportional set size in bytes, and what of it is no file's; 0 for a process that is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    sizes = {line.split()[0]: 1024 * int(line.split()[1]) for line in rollup.splitlines()[1:]}
    return sizes.get("Pss:", 0), sizes.get("Pss_Anon:", 0)


if __name__ == "__main__":
    main()
