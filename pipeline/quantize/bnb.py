"""bitsandbytes formats (Dettmers et al. 2022, 2023), quantized by bitsandbytes itself, taken over byte for byte.

The functional interface is used on the weights alone. A bitsandbytes module would repack its absmax in the first
forward on some CPUs and give corrupt values afterwards; no module is made here, so there is no forward.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from edgepress.pipeline.checkpoint.packed import PackedLinear, block_for
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.registry import require


def quantize_4bit(job: QuantizeJob) -> dict[str, PackedLinear]:
    """NF4 or FP4 by ``options.method``; absmax in float32, one for every block of the flattened matrix."""
    require("bitsandbytes")
    from bitsandbytes import functional

    kind: Literal["nf4", "fp4"] = "nf4" if job.options.method == "nf4" else "fp4"
    group = job.options.group
    linears = {}
    for name, weight in progress(job.weights(), kind, "matrix"):
        packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=group, quant_type=kind)
        codes, scales = packed.flatten().numpy(), state.absmax.float().numpy()
        linears[name] = PackedLinear(name, (weight.shape[0], weight.shape[1]), 4, group, codes, scales, codebook=kind)
    return linears


def quantize_int8(job: QuantizeJob) -> dict[str, PackedLinear]:
    """LLM.int8 weights: one absmax a row, code = q + 128, scale = absmax / 127 repeated for every block of the operator."""
    require("bitsandbytes")
    from bitsandbytes import functional

    linears = {}
    for name, weight in progress(job.weights(), "int8", "matrix"):
        # bitsandbytes takes float16 here, where a weight beyond its range would become Inf
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise ModelError(f"{name} has weights beyond the range of float16, which int8 goes through; use --method rtn --bits 8")
        q, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        codes = (q.to(torch.int16) + 128).to(torch.uint8).numpy()
        group = block_for(job.options.group, codes.shape[1])
        groups = -(-codes.shape[1] // group)
        scales = np.repeat((absmax.float().numpy() / np.float32(127))[:, None], groups, axis=1)
        linears[name] = PackedLinear.from_codes(name, codes, scales, None, 8, group)
    return linears
