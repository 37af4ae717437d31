"""What a build is expected to take on this machine: a simple model of the passes that each stage makes over its tokens.

seconds = 2 x weights x tokens x passes / rate, the rate that of a float32 matrix product measured here and now, plus what does not
go with tokens. Dequantizing, hashing and writing are proportional to the parameters.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepress.models import OTHER_TEXT
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.flags import Options
from edgepress.pipeline.machine import memory_budget, too_large
from edgepress.pipeline.options import (
    HEALED_TOKENS,
    MIXED,
    ORIGINAL_ROUNDS,
    OWN_TOKENS,
    PRUNE_TOKENS,
    BenchOptions,
    ExportOptions,
    HealOptions,
    NarrowOptions,
    PruneOptions,
    QuantizeOptions,
    TuneOptions,
)

_SIDE, _PRODUCTS = 1024, 8
_BLOCK = re.compile(r"\.(\d+)\.")  # in the names of a block's tensors
# Of quantize/trials.py and text/windows.py, which load numpy.
TRIAL_TOKENS, PROOF_TOKENS, PROOF_LOGITS = 2048, 512, 2**25
SOLVING = {"gptq": 24000, "gptqmodel": 30000}  # tokens whose passes take as long as GPTQ's own arithmetic
BYTES_A_TOKEN = 4.0
MOST_PASSES = 10  # of tune/train.py
TUNE_PASSES = 4  # forward passes that a token costs which is learned from
MIX_PASSES = 34  # over the trial's text: what each matrix costs, and what a few mixes do
STEP = 13  # a token that the original decodes by itself: it reads all weights
SAMPLING = 4  # the same of a token that a text is written of to calibrate on: in batches, but one after the other
WHOLE = 1.4  # of a token in a short window, what one in a window of the whole context takes
CONTINUED = 400  # tokens that the original decodes for the benchmark: of bench/evaluate.py
# A model of fewer parameters hardly ever keeps to so small a growth at 4 bits: its bits are chosen matrix by matrix, which takes at
# least this share of the most.
SMALL_MODEL, SMALL_GROWTH, LEAST_CHOICE = 1e9, 0.05, 0.7
EFFICIENCY = 0.8  # of the rate of one matrix product, that a forward pass of a model reaches
START_S = 4.0  # for a process to import torch and transformers
PARAMETERS_PER_S = 60e6  # that one stage reads, checks, hashes and writes
SLOW_PARAMETERS_PER_S = 3.5e6  # the same of an export: 8-bit weights that meet float activations have no fast kernel
HEAD_COST = 2  # times the head's own products: few rows at a time, for logits take memory
LOGITS_PER_S = 150e6  # that a row of the benchmark compares with the original's
# How wrong the model has been on quiet and busy machines: the range that is printed.
LEAST, MOST = 0.8, 1.4
LIBRARIES, WORKING = 0.45e9, 0.4e9  # bytes: torch and transformers in memory; states, logits by rows, one matrix in pieces
CHOOSING = 0.7e9  # bytes, at most, beside the weights and a head as it was, for derivatives by them
SQUARE = 24  # bytes, times the square of the widest matrix's inputs: what is summed over the text, in float64, and its factor
TABLE = 7  # bytes a number of the embedding while it is read: as stored, in float32, and what is looked through; as measured
PROOF_COPIES = 3.5  # of the logits of a window of the proof: torch's, onnxruntime's, what is made of them


@dataclass(frozen=True)
class Expectation:
    """Wall-clock seconds, least and most, and bytes of memory: at the peak, and the least that the model can be worked on in."""

    seconds: tuple[float, float]
    memory: float
    least: float = 0.0

    def shortage(self, free: int | None) -> str:
        """What is wrong where so many bytes are free; "" where they are enough, or unknown."""
        if free is None or free >= self.least:
            return ""
        return (
            f"this model takes {self.least / 1e9:.1f} GB of memory at the very least, for its largest block or its embedding; "
            f"{free / 1e9:.1f} GB are free; close other programs, or press a smaller model"
        )

    @property
    def duration(self) -> str:
        """``4 to 6 minutes``."""
        return _duration(*self.seconds)

    def line(self) -> str:
        """``expect 4 to 6 minutes and about 1.5 GB of memory on this machine``."""
        return f"expect {self.duration} and about {self.memory / 1e9:.1f} GB of memory on this machine"

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

    a, best = np.ones((_SIDE, _SIDE), dtype=np.float32), math.inf
    for _ in range(_PRODUCTS):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * _SIDE**3 / best


def expect(source: Path, steps: list[tuple[str, Options]], rate: float, removing: bool = False) -> Expectation:
    """Of the stages ``steps`` on the checkpoint in the folder ``source``.

    rate: what ``matmul_rate`` measured. removing: whether layers were removed by a stage that is done already.
    """
    shapes = ShardIndex.of(source).shapes
    parameters = sum(map(math.prod, shapes.values()))
    vocabulary = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=0)  # the embedding has the most rows
    blocks = sum(math.prod(shape) for name, shape in shapes.items() if _BLOCK.search(name))
    head = 2 * HEAD_COST * _largest_outside(shapes) / (EFFICIENCY * rate)  # seconds of a token in it
    token = head + 2 * blocks / (EFFICIENCY * rate)
    removing = removing or any(isinstance(o, PruneOptions) and o.max_loss is None for _, o in steps)
    narrowing = any(isinstance(o, NarrowOptions) for _, o in steps)
    low, high, memory = 0.0, 0.0, 4.0 * parameters
    for _, options in steps:
        compared = removing or (narrowing and isinstance(options, BenchOptions))  # with the same without removal
        least, most, fixed = _work(options, compared, parameters)
        if isinstance(options, TuneOptions) and not options.tune_tokens:
            most = min(most, 60 * options.minutes / token + SAMPLING * options.own_tokens(parameters))
        fixed += START_S + parameters / PARAMETERS_PER_S
        low, high = low + least * token + fixed, high + most * token + fixed
        if isinstance(options, QuantizeOptions) and options.max_growth is not None:
            memory = max(memory, 4.0 * (parameters + _largest_outside(shapes)) + min(CHOOSING, 8.0 * parameters))
        if isinstance(options, ExportOptions):
            high += parameters / SLOW_PARAMETERS_PER_S
            memory = max(memory, 4.0 * (parameters + PROOF_COPIES * min(PROOF_TOKENS * vocabulary, PROOF_LOGITS)))
        if isinstance(options, BenchOptions):
            text, rows = _scored(options, compared)
            seconds = rows * text * (vocabulary / LOGITS_PER_S + head)  # of the original, once more
            low, high = low + seconds, high + 1.5 * seconds
    least = least_memory(shapes)
    if too_large(parameters):  # they lie in a file
        memory = min(memory, max(memory_budget() or 0.0, least - LIBRARIES - WORKING))
    return Expectation((LEAST * low, MOST * high), LIBRARIES + WORKING + memory, least)


def least_memory(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Bytes that work on a checkpoint takes at least, however little memory its weights may have: its largest block in float32, and
    what GPTQ and closed-form healing keep for its widest matrix; or its embedding as it is read. shapes: of its tensors, by name.
    """
    blocks: Counter[str] = Counter()
    for name, shape in shapes.items():
        if found := _BLOCK.search(name):
            blocks[found[1]] += math.prod(shape)
    widest = max((max(shape[-2:]) for name, shape in shapes.items() if len(shape) > 1 and _BLOCK.search(name)), default=0)
    return LIBRARIES + WORKING + max(4.0 * max(blocks.values(), default=0) + SQUARE * widest**2, TABLE * _largest_outside(shapes))


def _largest_outside(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers of the largest tensor that belongs to no block: the embedding, or a head as large."""
    return max((math.prod(shape) for name, shape in shapes.items() if not _BLOCK.search(name)), default=0)


def _tokens(budget: int, text: Path) -> float:
    """Tokens of a text that will be read: ``budget``, or all there are."""
    if text == MIXED:
        return min(budget, 2 * OWN_TOKENS + OTHER_TEXT.stat().st_size / BYTES_A_TOKEN)
    return min(budget, text.stat().st_size / BYTES_A_TOKEN if text.is_file() else budget)


def _scored(options: BenchOptions, removing: bool) -> tuple[float, float]:
    """Tokens of the benchmark's text, and how many models read it: original, pruned and quantized checkpoints, artifact."""
    return _tokens(options.text_tokens, options.text), 3.0 + removing


def _work(options: Options, removing: bool, parameters: int) -> tuple[float, float, float]:
    """Tokens that a stage takes forward through the whole model, all passes together, least and most, and seconds besides."""
    if isinstance(options, PruneOptions):
        text = _tokens(options.calibration_tokens or PRUNE_TOKENS, options.calibration)
        rounds = 0 if options.remove_layers else options.remove_count or 2
        one = plain = (1 + options.shortlist / 2) * options.greedy_tokens
        if options.criterion in (None, "healed"):  # both models read what the healing of a trial is solved on
            one += 2 * min(HEALED_TOKENS * options.greedy_tokens, text)
        # three quarters of the text rank, a quarter is held out and read twice; under a limit once where a first removal costs too
        # much, by far as it goes, and five times where two are made, three of them with half of another text
        if options.max_loss is not None:
            return text + plain, 2.75 * text + rounds * (plain + one), 0.0
        return 1.25 * text + rounds * one, 1.25 * text + rounds * one, 0.0
    if isinstance(options, HealOptions):
        tokens = 4.5 * _tokens(options.calibration_tokens or PRUNE_TOKENS, options.calibration)
        tokens += TUNE_PASSES * options.lora_tokens * ("lora" in options.healer)
        return tokens * removing, tokens * removing, 0.0
    if isinstance(options, NarrowOptions):  # three passes over three quarters of the text, sums of squares, two of the rest
        text = _tokens(options.calibration_tokens or PRUNE_TOKENS, options.calibration)
        return 4 * text, 6 * text, 0.0
    if isinstance(options, QuantizeOptions):
        gptq = 0.0
        if options.method in SOLVING:
            gptq = 2 * _tokens(options.calibration_tokens, options.calibration) + SOLVING[options.method]
        writing = SAMPLING * OWN_TOKENS
        if options.max_growth is None:
            gptq += writing * (options.calibration == MIXED and gptq > 0)
            return gptq, gptq, 0.0
        # more bits may be taken everywhere, which need no calibration, or matrix by matrix; the model writes a text to judge by
        most = (3 + MIX_PASSES) * TRIAL_TOKENS + writing + gptq
        by_matrix = parameters < SMALL_MODEL and options.max_growth <= SMALL_GROWTH
        return LEAST_CHOICE * most if by_matrix else 3 * TRIAL_TOKENS, most, 0.0
    if isinstance(options, TuneOptions):  # nothing, where all matrices have 8 bits
        text = options.calibration_tokens or options.own_tokens(parameters)
        return 0.0, SAMPLING * text + TUNE_PASSES * (options.tune_tokens or MOST_PASSES * text), 0.0
    if isinstance(options, ExportOptions):
        return 2 * PROOF_TOKENS, 6 * PROOF_TOKENS, 10.0
    if isinstance(options, BenchOptions):
        text, rows = _scored(options, removing)
        with_original = options.original_speed and options.target != "cuda"
        runs = with_original * (min(options.repeats, ORIGINAL_ROUNDS) + 1)  # in the first round of two types
        by_torch = runs * (4 * sum(options.prompt_lengths) + STEP * options.new_tokens) + STEP * CONTINUED
        seconds = options.repeats * 4.0 * (1 + removing) + runs * START_S
        return rows * WHOLE * text + by_torch, (rows + removing) * WHOLE * text + by_torch, seconds
    return 0.0, 0.0, 0.0
