"""The reader of each format that other libraries quantize to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from edgepress.pipeline.checkpoint.admission import settings_of
from edgepress.pipeline.checkpoint.importers.bnb import BnbFolder
from edgepress.pipeline.checkpoint.importers.gptq import GptqFolder
from edgepress.pipeline.checkpoint.packed import PackedMatrices
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.errors import ModelError

# quant_method of config.json -> reader; the same names as admission.READABLE
READERS: dict[str, type[GptqFolder | BnbFolder]] = {"gptq": GptqFolder, "bitsandbytes": BnbFolder}


def open_quantized(
    folder: Path, index: ShardIndex, original: Callable[[str], np.ndarray | None] | None = None
) -> PackedMatrices | None:
    """The packed matrices of a folder that another library quantized, None for a float one.

    original: the float weights (out, in) of a module, where the user has them. Raises ModelError for what cannot be read.
    """
    settings = settings_of(folder)
    if settings is None:
        return None
    method = str(settings["quant_method"])
    if method not in READERS:
        known = " and ".join(READERS)
        raise ModelError(f"{folder} is quantized by {method}, and only {known} can be read; give the original float checkpoint")
    return READERS[method](folder, index, settings, original)
