"""An artifact of more than 2 GB, which no single ONNX message holds: exported, verified and run, in a folder with odd letters.

    python benchmarks/large_artifact.py SCRATCH_FOLDER [--gigabytes 2.4]

Writes a random bfloat16 Llama whose float32 weights have that size and exports it unquantized, each command in a process of
its own. Needs three times the size on disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from edgepress.models import REFERENCE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

COMMAND = """
import sys
from edgepress.pipeline.cli import main
code = main(sys.argv[1:])
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"exit code {code}, peak RSS {peak / 1e6:.1f} GB", file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.4)
    options = parser.parse_args()
    source, out = options.folder / "großes Modell", options.folder / "großes Artefakt"
    write(source, options.gigabytes)
    command("export", source, out)
    size = (out / "model.onnx.data").stat().st_size
    print(f"model.onnx.data has {size:,} bytes; one message holds {2**31 - 1:,}")
    assert size >= 2**31
    command("verify", out)
    command("run", out, "The old house stood", "--max-new-tokens", 8)


def command(*arguments: object) -> None:
    """Run and time ``edgepress ...``; its own output goes through."""
    print(f"$ edgepress {' '.join(map(str, arguments))}", flush=True)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", COMMAND, *map(str, arguments)], check=True)
    print(f"{time.perf_counter() - begun:.0f} s\n", flush=True)


def write(folder: Path, gigabytes: float) -> None:
    """A random checkpoint with as many layers as give this size in float32."""
    settings = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    settings |= {"vocab_size": 5120, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 160}
    a_layer = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    layers = max(1, round((gigabytes * 1e9 / 4 - 5120 * 2048) / a_layer))
    config = LlamaConfig(**settings, num_hidden_layers=layers, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(REFERENCE).save_pretrained(folder)


if __name__ == "__main__":
    main()
