"""Removing layers from a large sharded checkpoint: peak memory, and speed against a plain copy of what is kept, in one run.

    python benchmarks/removal_memory.py SCRATCH_FOLDER [--gigabytes 5]

Writes a random bfloat16 Llama of that size in shards of one gigabyte, then removes every fourth layer of it in a process of
its own. Needs twice the size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, HEADS = 2048, 8192, 32
REMOVE = """
import json, os, sys, time
from pathlib import Path
def peak():  # of this process alone: ru_maxrss would begin with the parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
begun = time.perf_counter()
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks
source, out, kept = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
imported = peak()
checkpoint = Checkpoint(source)
config = pruned_config(checkpoint, kept)
checked = time.perf_counter()
remove_blocks(checkpoint, out, "model.layers", kept, config)
os.sync()
done = time.perf_counter()
print(json.dumps({"imports_kb": imported, "peak_kb": peak(), "check_s": checked - begun, "copy_s": done - checked}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="removals and copies, one after the other; the best of each counts")
    options = parser.parse_args()
    source, out = options.folder / "whole", options.folder / "pruned"
    layers = write(source, options.gigabytes)
    kept = [index for index in range(layers) if index % 4 != 2]
    out.mkdir(exist_ok=True)
    (options.folder / "copy").mkdir(exist_ok=True)
    removals, copies = [], []
    for _ in range(options.repeats):
        os.sync()
        command = [sys.executable, "-c", REMOVE, str(source), str(out), json.dumps(kept)]
        removals.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        files = sorted(map(str, out.glob("*.safetensors")))
        begun = time.perf_counter()
        subprocess.run(["cp", *files, str(options.folder / "copy")], check=True)
        os.sync()
        copies.append(time.perf_counter() - begun)
    removal, copied = min(removals, key=lambda one: one["copy_s"]), min(copies)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"checkpoint {whole / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, {layers} layers")
    print(f"kept {len(kept)} layers, {size / 1e9:.2f} GB, in {removal['copy_s']:.2f} s ({size / 1e9 / removal['copy_s']:.2f} GB/s)")
    print(f"cp of what is kept: {copied:.2f} s ({size / 1e9 / copied:.2f} GB/s)")
    print(f"imports and check of the config: {removal['check_s']:.1f} s")
    print(f"peak RSS {removal['peak_kb'] / 1024:.0f} MiB, of which imports {removal['imports_kb'] / 1024:.0f} MiB")


def write(folder: Path, gigabytes: float) -> int:
    """A sharded checkpoint of about this size; returns its number of layers."""
    folder.mkdir(parents=True, exist_ok=True)
    linears = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
    linears |= {
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    bytes_a_layer = 2 * sum(a * b for a, b in linears.values())
    layers = max(4, round(gigabytes * 1e9 / bytes_a_layer))
    shard, where, number = {}, {}, 1
    shard["model.embed_tokens.weight"] = torch.randn(1024, HIDDEN).bfloat16()
    shard["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    for layer in range(layers):
        for name, shape in (linears | norms).items():
            shard[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape).bfloat16()
        if layer == layers - 1 or sum(t.numel() * 2 for t in shard.values()) > 1e9:
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return layers


if __name__ == "__main__":
    main()
