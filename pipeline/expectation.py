"""What a build is expected to take on this machine: a simple model of the passes that each stage makes over its tokens.

seconds = 2 x parameters x tokens x passes / rate, the rate that of a float32 matrix product measured here and now, plus what does
not go with tokens. Dequantizing, hashing and writing are proportional to the parameters.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from edgepress.pipeline.checkpoint.shards import shapes_of
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.flags import Options
from edgepress.pipeline.options import PRUNE_TOKENS, BenchOptions, ExportOptions, HealOptions, PruneOptions, QuantizeOptions

_SIDE, _PRODUCTS = 1024, 4
EFFICIENCY = 0.6  # of the rate of one matrix product, that a forward pass of a model reaches
START_S = 4.0  # for a process to import torch and transformers
PARAMETERS_PER_S = 60e6  # that one stage reads, checks, hashes and writes
# How wrong the model has been on quiet and busy machines: the range that is printed.
LEAST, MOST = 0.7, 1.6
LIBRARIES, WORKING = 0.45e9, 0.4e9  # bytes: torch and transformers in memory; states, logits by rows, one matrix in pieces


@dataclass(frozen=True)
class Expectation:
    """Wall-clock seconds, least and most, and bytes of memory at the peak."""

    seconds: tuple[float, float]
    memory: float

    def line(self) -> str:
        """``expect 4 to 6 minutes and about 1.5 GB of memory on this machine``."""
        low, high = self.seconds
        return f"expect {_duration(low, high)} and about {self.memory / 1e9:.1f} GB of memory on this machine"

    def facts(self) -> JsonObject:
        """As build.json has them."""
        return {"seconds": [round(self.seconds[0]), round(self.seconds[1])], "memory_bytes": round(self.memory)}


def _duration(low: float, high: float) -> str:
    if high < 90:
        return f"{max(1, round(low))} to {max(2, round(high))} seconds"
    return f"{max(1, math.floor(low / 60))} to {math.ceil(high / 60)} minutes"


def matmul_rate() -> float:
    """Floating-point operations a second of a float32 matrix product, the best of a few: half a second at most."""
    import numpy as np

    a = np.ones((_SIDE, _SIDE), dtype=np.float32)
    best = math.inf
    for _ in range(_PRODUCTS):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * _SIDE**3 / best


def expect(source: Path, steps: list[tuple[str, Options]], rate: float) -> Expectation:
    """Of the stages ``steps`` on the checkpoint in the folder ``source``. rate: what ``matmul_rate`` measured."""
    parameters = sum(math.prod(shape) for shape in shapes_of(source).values())
    removing = any(isinstance(o, PruneOptions) and o.max_loss is None for _, o in steps)
    seconds = 0.0
    for _, options in steps:
        passes, fixed = _work(options, removing)
        seconds += 2 * parameters * passes / (EFFICIENCY * rate) + fixed + START_S + parameters / PARAMETERS_PER_S
    return Expectation((LEAST * seconds, MOST * seconds), LIBRARIES + WORKING + 4 * parameters)


def _work(options: Options, removing: bool) -> tuple[float, float]:
    """Tokens that a stage takes forward through the whole model, all passes together, and seconds besides."""
    if isinstance(options, PruneOptions):
        tokens = options.calibration_tokens or PRUNE_TOKENS
        rounds = options.remove_count or 2
        trials = 0 if options.remove_layers else rounds * (1 + options.shortlist / 2) * options.greedy_tokens
        return 0.75 * tokens + 0.25 * tokens * 2 + trials, 0.0
    if isinstance(options, HealOptions):
        return (6.0 * (options.calibration_tokens or PRUNE_TOKENS) if removing else 0.0), 0.0
    if isinstance(options, QuantizeOptions):
        trial = 3 * 2048 if options.max_growth is not None else 0
        # forward twice, and the Hessians and the solution cost about as much as a pass each
        return trial + (4.0 * options.calibration_tokens if options.method == "gptq" else 0.0), 0.0
    if isinstance(options, ExportOptions):
        return 4 * 1024.0, 10.0
    if isinstance(options, BenchOptions):
        return options.text_tokens * (3.0 + removing), options.repeats * 4.0 * (1 + removing)
    return 0.0, 0.0
