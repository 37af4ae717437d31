"""Checkpoints that others quantized, read as they are: one format a file, each a mapping of module name -> PackedLinear.

No quantized torch module is ever built: a GPTQ or bitsandbytes module cannot be traced, needs its own kernels, and on some
CPUs repacks its values in the first forward. The arrays are read from the safetensors files and repacked, integer for integer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.importers.bnb import BnbFolder
from edgepress.pipeline.importers.gptq import GptqFolder
from edgepress.pipeline.source import settings_of

# quant_method of config.json -> reader; the same names as source.READABLE
READERS: dict[str, type[GptqFolder | BnbFolder]] = {"gptq": GptqFolder, "bitsandbytes": BnbFolder}


def open_quantized(
    folder: Path, shards: list[Path], original: Callable[[str], np.ndarray | None] | None = None
) -> GptqFolder | BnbFolder | None:
    """The packed matrices of a folder that others quantized, None for a float one.

    original: the float weights (out, in) of a module, where the user has them. Raises ModelError for what cannot be read.
    """
    settings = settings_of(folder)
    if settings is None:
        return None
    method = str(settings["quant_method"])
    if method not in READERS:
        known = " and ".join(READERS)
        raise ModelError(f"{folder} is quantized by {method}, and only {known} can be read; give the original float checkpoint")
    return READERS[method](folder, shards, settings, original)
