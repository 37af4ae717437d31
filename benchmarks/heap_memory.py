"""Peak memory of a model whose matrices are read and dropped in turn, with glibc's own bound for large blocks and with ours.

    python benchmarks/heap_memory.py CHECKPOINT

One forward of 2,048 tokens each, in processes of their own, with weights that are in memory only while they are needed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

_TEXT = Path(__file__).parents[1] / "models" / "reference" / "evaluation.txt"


def main(folder: Path) -> None:
    for word in ("glibc", "edgepress"):
        subprocess.run([sys.executable, __file__, str(folder), word], check=True)


def measure(folder: Path, word: str) -> None:
    from edgepress.pipeline import machine
    from edgepress.pipeline.checkpoint.blocks import Blocks
    from edgepress.pipeline.checkpoint.folder import Checkpoint
    from edgepress.pipeline.metrics.torch_scores import mean_loss
    from edgepress.pipeline.text.windows import text_windows

    begun = time.perf_counter()
    with machine.large_blocks_given_back() if word == "edgepress" else nullcontext():
        mean_loss(Blocks(Checkpoint(folder).offloaded_model()), text_windows(_TEXT, folder, budget=2048))
    print(f"{word}: {(machine.peak_memory() or 0) / 1e9:.2f} GB, {time.perf_counter() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
