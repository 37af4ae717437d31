"""Products as the output heads of models have them, by MKL as torch does, and by oneDNN: float32, milliseconds and GFLOP/s.

python benchmarks/products.py [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

# What a matrix is of: outputs and inputs.
MATRICES = {
    "SmolLM2-135M, gate": (1536, 576), "SmolLM2-135M, head": (49152, 576), "Qwen2.5-0.5B, gate": (4864, 896),
    "Qwen2.5-0.5B, head": (151936, 896), "Gemma 3 270M, head": (262144, 640),
}  # fmt: skip
ROWS, ROUNDS = (24, 128, 256, 1024), 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print("| matrix | rows | MKL | oneDNN | MKL / oneDNN |\n| --- | ---: | ---: | ---: | ---: |")
    for name, (outputs, inputs) in MATRICES.items():
        weight = torch.randn(outputs, inputs)
        for rows in (rows for rows in ROWS if rows * outputs < 2**27):
            x = torch.randn(rows, inputs)
            by_mkl, by_onednn = alternately(
                lambda x=x, weight=weight: torch.nn.functional.linear(x, weight),
                lambda x=x, weight=weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
            )
            operations = 2e-9 * rows * outputs * inputs
            figures = (f"{1000 * seconds:.1f} ms, {operations / seconds:.0f}" for seconds in (by_mkl, by_onednn))
            print(f"| {name} | {rows} | {' | '.join(figures)} | {by_mkl / by_onednn:.2f} |", flush=True)


def alternately(*ways: Callable[[], object]) -> list[float]:
    """Median seconds of each, one after the other in every round; the first round does not count."""
    samples: list[list[float]] = [[] for _ in ways]
    for _ in range(1 + ROUNDS):
        for way, found in zip(ways, samples, strict=True):
            begun = time.perf_counter()
            way()
            found.append(time.perf_counter() - begun)
    return [sorted(found[1:])[ROUNDS // 2] for found in samples]


if __name__ == "__main__":
    main()
