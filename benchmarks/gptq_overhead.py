"""Time and peak memory of the GPTQ stage against gptqmodel called plainly, on a random model of SmolLM2-135M's shape.

    python benchmarks/gptq_overhead.py [--layers 30] [--tokens 2048] [--repeats 3]

Both in turn, each in fresh processes, in one run: A B A B. Memory is the proportional set size (PSS) of the whole process tree,
sampled every 250 ms, at its peak. CPU time is what a busy machine disturbs least. The stage does more than the plain call: it
keeps what is needed to resume, rounds the head, proves every matrix and writes the packed folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from edgepress.models import CALIBRATION_TEXT, REFERENCE
from edgepress.pipeline.text.windows import text_windows
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

PLAIN = """
import json, sys
import torch
from gptqmodel import GPTQModel, QuantizeConfig
source, out, rows = sys.argv[1:]
config = QuantizeConfig(bits=4, group_size=64, sym=False, desc_act=False, act_group_aware=False, pack_impl="original",
                        offload_to_disk_path=out + "-offload")
model = GPTQModel.load(source, config, dtype=torch.float32, device="cpu")
rows = json.load(open(rows))
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
model.save(out)
"""
OURS = """
import sys
from pathlib import Path
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.stages import run
source, out, tokens = sys.argv[1:]
options = QuantizeOptions(method="gptq", bits=4, group_size=64, calibration_tokens=int(tokens))
run("quantize", Artifact.load(Path(source)), Path(out), options)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens (default: 2048)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgepress-overhead-") as scratch:
        folder = Path(scratch)
        source = model(folder / "model", options.layers)
        rows = text_windows(CALIBRATION_TEXT, source, budget=options.tokens, shortest=16)
        (folder / "rows.json").write_text(json.dumps([row.tolist() for row in rows]))
        found: dict[str, list[tuple[float, float, int]]] = {"plain": [], "stage": []}
        for number in range(options.repeats):
            arguments = {
                "plain": [PLAIN, source, folder / f"plain-{number}", folder / "rows.json"],
                "stage": [OURS, source, folder / f"stage-{number}", options.tokens],
            }
            for name, parts in arguments.items():
                found[name].append(measured([sys.executable, "-c", *map(str, parts)], folder))
                wall, cpu, peak = found[name][-1]
                print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU, {peak / 2**20:.0f} MiB", flush=True)
    for index, what in enumerate(("time", "CPU time", "peak memory")):
        ratios = [ours[index] / plain[index] for plain, ours in zip(found["plain"], found["stage"], strict=True)]
        print(f"{what} of the stage / plain gptqmodel: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def model(folder: Path, layers: int) -> Path:
    """SmolLM2-135M's shape with random weights; the vocabulary of the reference tokenizer is the first part of its 49,152."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(folder)
    return folder


def measured(command: list[str], cwd: Path) -> tuple[float, float, int]:
    """(seconds, CPU seconds, peak bytes) of the process and all below it."""
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2))}
    begun, before, peak = time.monotonic(), os.times(), 0
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(pss, tree(process.pid))))
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"failed: {command[-3:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begun, cpu, peak


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in tree(child))]


def pss(pid: int) -> int:
    """Proportional set size in bytes, 0 for a process that is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
