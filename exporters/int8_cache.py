"""`--cache int8`: a quarter of the memory of keys and values, with scales that are measured and a proof of what that costs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.architecture import attending_layers, rotary_kind
from edgepress.exporters.graph.cache import to_int8
from edgepress.exporters.graph.files import save
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.parity import Parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.models import CALIBRATION_TEXT
from edgepress.models.families import head_size
from edgepress.models.rotary import parameters
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.runtime.decoder import MODEL, Decoder
from edgepress.pipeline.text.windows import text_windows

log = logging.getLogger("edgepress")
TOKENS, WINDOW = 4096, 512
# Over the largest value that was seen: another text may hold larger ones, which would be clipped.
MARGIN = 1.1
LARGEST, _LEAST = 127, 1e-6
MOST = 0.01  # nats a token that the cache may add
# Read in pieces or in a padded batch, logits may be so many times as far from the checkpoint's as read at once, or as NOISE
# standard deviations: a kernel that is wrong there is off by many times that.
APART, NOISE = 4.0, 0.1


@dataclass(frozen=True)
class Int8Cache:
    """What ships, compared with the checkpoint, and how much more KL divergence it has than with a float cache, nats a token."""

    proof: Parity
    added_kl: float

    def facts(self) -> JsonObject:
        """As the manifest has them: the last is what the artifact as it ships may differ by, which verify holds it to."""
        return {"cache": "int8", "cache_added_kl": self.added_kl, "max_added_kl": self.proof.kl_mean - self.added_kl + MOST}


def quantize_cache(reference: ReferenceLogits, checkpoint: Checkpoint, folder: Path, before: Parity) -> Int8Cache:
    """Let ``folder/model.onnx`` keep its cache in int8. before: the proof of what it is.

    Raises ProofError where that adds more than MOST.
    """
    largest = _largest(folder, _rotated(checkpoint))
    graph = ir.load(folder / MODEL)
    to_int8(graph, {name: np.maximum(MARGIN * value, _LEAST) / LARGEST for name, value in largest.items()})
    save(graph, folder / MODEL)
    proof = parity.measure(reference, lambda: Decoder(folder), before.accuracy_level)
    pieces = max(proof.difference_chunks, proof.difference_steps, proof.difference_batch)
    if not pieces <= APART * max(proof.difference_whole, before.difference, NOISE):
        raise ProofError(
            f"with a cache in int8 logits differ by {pieces:.2g} standard deviations where a text is read in pieces or in a batch, "
            f"and by {proof.difference_whole:.2g} where it is read at once: onnxruntime cannot do it here; leave --cache out"
        )
    added = proof.kl_mean - before.kl_mean
    if not added <= MOST:
        raise ProofError(f"a cache in int8 adds KL {added:.2g}, and {MOST:g} is allowed; leave --cache out")
    log.info("export: cache in int8, a quarter of the memory; adds KL %.2g", added)
    return Int8Cache(proof, added)


def _rotated(checkpoint: Checkpoint) -> dict[str, int]:
    """Of the keys of every layer, how many channels a rotary embedding turns, by the name of the cache's input."""
    config = checkpoint.config
    layers = attending_layers(config, checkpoint.silent)
    return {
        f"past_key_values.{number}.key": 0
        if rotary_kind(config, index) is None
        else int(head_size(config) * parameters(config, index).get("partial_rotary_factor", 1))
        for number, index in enumerate(layers)
    }


def _largest(folder: Path, rotated: dict[str, int]) -> dict[str, np.ndarray]:
    """The largest absolute value of every channel of the cache: float32 (heads, head size), by the input's name.

    A rotary embedding turns two channels of a key into one another as the text goes on: at some position either holds what both
    have together, so that is what both are allowed, however long the text becomes.
    """
    decoder, largest = Decoder(folder), dict[str, np.ndarray]()
    for ids in text_windows(CALIBRATION_TEXT, folder, budget=TOKENS, length=min(WINDOW, decoder.context)):
        decoder.reset(len(ids))
        decoder.feed(ids)
        for name, array in decoder.cached().items():
            values, half = np.abs(array), rotated.get(name, 0) // 2
            pair = np.hypot(values[..., :half], values[..., half : 2 * half])
            most = np.concatenate([pair, pair, values[..., 2 * half :]], axis=-1).max(axis=1)
            largest[name] = np.maximum(largest.get(name, most), most)
    return largest
