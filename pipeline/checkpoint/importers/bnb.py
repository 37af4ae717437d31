"""bitsandbytes checkpoints, as transformers' save_pretrained writes them: NF4 and FP4, single or double quantized, and LLM.int8.

Read from the file, before any forward: on CPUs with AVX512 a bitsandbytes module repacks its absmax in the first one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from edgepress.pipeline.checkpoint.layout import PackedRow, check_arrays
from edgepress.pipeline.checkpoint.packed import CODEBOOKS, PackedLinear, PackedMatrices
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.documents import DocumentError, parse_json, typed
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject

_STATE = re.compile(r"(.+)\.weight\.quant_state\.bitsandbytes__(nf4|fp4)")


@dataclass(frozen=True)
class _State:
    """What bitsandbytes stores of a matrix as JSON; nested_*: where its scales are quantized. Raises ValueError."""

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int = 256
    nested_offset: float = 0.0

    def __post_init__(self) -> None:
        if min(*self.shape, self.blocksize, self.nested_blocksize) < 1 or max(*self.shape, self.blocksize) > 1 << 31:
            raise ValueError("a size out of range")


class BnbFolder(PackedMatrices):
    """The packed matrices of a bitsandbytes folder."""

    def __init__(
        self,
        folder: Path,
        index: ShardIndex,
        settings: JsonObject,
        original: Callable[[str], np.ndarray | None] | None = None,
    ) -> None:
        self._index, names = index, index.names
        self._kinds = {match[1]: match[2] for name in sorted(names) if (match := _STATE.fullmatch(name))}
        self._kinds |= {name.removesuffix(".SCB"): "int8" for name in sorted(names) if name.endswith(".SCB")}
        super().__init__(self._kinds)
        if not self._kinds:
            raise ModelError(f"{folder} claims to be bitsandbytes but holds no such matrix; give the complete checkpoint")
        self.parts = {name: module for name in names if (module := self._module(name)) in self._kinds}
        self.codes = {f"{module}.weight" for module in self._kinds}  # of any type: bnb_4bit_quant_storage
        self.described = {"quant_method": "bitsandbytes", "kinds": sorted(set(self._kinds.values()))}

    @staticmethod
    def _module(name: str) -> str:
        """The module behind ``M.weight``, ``M.weight.absmax``, ``M.SCB`` and so on."""
        return re.sub(r"\.(weight(\..+)?|SCB|weight_format)$", "", name)

    def __getitem__(self, name: str) -> PackedLinear:
        kind = self._kinds[name]
        return self._int8(name) if kind == "int8" else self._codebook(name, "nf4" if kind == "nf4" else "fp4")

    def _codebook(self, name: str, kind: Literal["nf4", "fp4"]) -> PackedLinear:
        """Codes as they are; absmax too, or dequantized where it is quantized itself (Dettmers et al. 2023, section 3)."""
        stored = bytes(self._index.read(f"{name}.weight.quant_state.bitsandbytes__{kind}"))
        try:
            state = typed(_State, parse_json(stored), "quant_state")
        except DocumentError as error:
            raise ModelError(f"{name} has a damaged quant_state ({error}); give the original float checkpoint") from error
        if not np.array_equal(self._index.tensor(f"{name}.weight.quant_map").float().numpy(), CODEBOOKS[kind]):
            raise ModelError(f"{name} has a custom codebook, which no operator supports; give the original float checkpoint")
        codes = (
            self._index.tensor(f"{name}.weight").contiguous().view(torch.uint8).flatten().numpy()
        )  # whatever type stored the bytes
        absmax = self._index.tensor(f"{name}.weight.absmax").numpy()
        if absmax.dtype == np.uint8:
            table = self._index.tensor(f"{name}.weight.nested_quant_map").float().numpy()
            outer = self._index.tensor(f"{name}.weight.nested_absmax").float().numpy()
            spread = np.repeat(outer, state.nested_blocksize)[: absmax.size]
            if table.shape != (256,) or spread.size != absmax.size:
                raise ModelError(
                    f"{name}: its nested scales do not fit its {absmax.size} blocks; give the original float checkpoint"
                )
            absmax = table[absmax] * spread + np.float32(state.nested_offset)
        scales = absmax.astype(np.float32)
        try:
            check_arrays(PackedRow(state.shape, 4, state.blocksize, kind), {"codes": codes, "scales": scales})
        except ValueError as error:
            raise ModelError(f"{name} is damaged ({error}); give the original float checkpoint") from error
        return PackedLinear(name, state.shape, 4, state.blocksize, codes, scales, codebook=kind)

    def _int8(self, name: str) -> PackedLinear:
        """Row-wise int8 (Dettmers et al. 2022): code = q + 128, scale = SCB / 127, repeated for every block of the operator."""
        q, absmax = self._index.tensor(f"{name}.weight"), self._index.tensor(f"{name}.SCB").float().numpy()
        if q.dtype != torch.int8 or q.ndim != 2 or absmax.shape != (q.shape[0],):
            raise ModelError(
                f"{name}: {tuple(q.shape)} {q.dtype} and {absmax.shape} scales are not an LLM.int8 matrix; replace the checkpoint"
            )
        if f"{name}.weight_format" in self._index and int(self._index.tensor(f"{name}.weight_format")):
            raise ModelError(f"{name} is stored in a tiled layout for one kind of GPU; save it again with a current bitsandbytes")
        codes = (q.to(torch.int16) + 128).to(torch.uint8).numpy()
        return PackedLinear.from_codes(name, codes, (absmax / np.float32(127))[:, None], None, 8, -1)
