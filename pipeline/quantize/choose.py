"""How many bits a model needs: trials of rounding on its own blocks, before anything is written.

Small models lose far more at 4 bits than large ones: SmolLM2-135M a third of its perplexity and more, where a 7 B model loses a few
per cent. Rounding to nearest stands in for every method in a trial: it needs no calibration and a minute at most.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks, block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import exact_losses
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.quantize.rtn import rounded
from edgepress.pipeline.quantize.stage import Chosen
from edgepress.pipeline.text.windows import text_windows

log = logging.getLogger("edgepress")
TRIAL_TOKENS, TRIAL_WINDOW = 2048, 256
# Growth of the loss under a calibrated method, in that of rounding: 0.42 to 0.52 on the models of docs/quantization.md, whose
# weights lie on no grid; of weights that were quantized before, GPTQ may lose as much as rounding.
CALIBRATED = 0.7
EIGHT_BITS = ("rtn", 8, 64)  # what is taken where fewer bits lose too much; calibration wins nothing there


def choose(source: Artifact, options: QuantizeOptions) -> Chosen:
    """The method as asked for if it keeps perplexity within ``options.max_growth``, else 8 bits.

    Measured on the calibration text, of which rounding learns nothing.
    """
    checkpoint = Checkpoint(source.path, options.trust_remote_code)
    model = checkpoint.model()
    text, skip = options.calibration, options.calibration_skip
    windows = text_windows(text, source.path, budget=TRIAL_TOKENS, skip=skip, length=min(TRIAL_WINDOW, checkpoint.context))
    blocks = Blocks(model)
    whole = exact_losses(blocks, progress(windows, "bits", "window"))
    limit = options.max_growth or 0.0
    growth: dict[str, float] = {}
    for method, bits, group in ((options.method, options.weight_bits, options.group), EIGHT_BITS):
        with rounded(block_linears(model), bits, group, checkpoint):
            losses = exact_losses(blocks, progress(windows, f"{bits} bits", "window"))
        change = float((losses - whole).mean()) * (CALIBRATED if method == "gptq" else 1.0)
        growth[str(bits)] = round(math.expm1(min(change, 50.0)), 5)
        chosen = replace(options, method=method, bits=bits, group_size=group, max_growth=None)
        if growth[str(bits)] <= limit:
            break
    return Chosen(chosen, _because(growth, limit), growth)


def _because(growth: dict[str, float], limit: float) -> str:
    figures = [f"{bits} bits {100 * share:+.1f} % of perplexity" for bits, share in growth.items()]
    within = "" if np.isclose(limit, 0) or list(growth.values())[-1] <= limit else ", which nothing here keeps to"
    return f"expected on the calibration text: {', '.join(figures)}; {100 * limit:g} % is allowed (--max-growth){within}"
