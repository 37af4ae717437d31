"""Whether a graph has the inputs and outputs that the decoder feeds and reads, checked once when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepress.pipeline.documents import shown

if TYPE_CHECKING:
    import onnxruntime

CACHE = "past_key_values."
_LARGEST_SIDE = 1 << 20  # heads, or the width of one
_IDS, _FLOATS, _INT8 = "tensor(int64)", ("tensor(float)", "tensor(float16)"), "tensor(int8)"


@dataclass(frozen=True)
class Signature:
    """caches: name of each input of the cache -> heads and head size. half: whether activations are float16.

    int8: whether the cache is.
    """

    caches: dict[str, tuple[int, int]]
    vocabulary: int
    half: bool
    int8: bool


def signature_of(session: onnxruntime.InferenceSession) -> Signature:
    """The signature of a loaded graph. Raises ValueError that names what differs from what edgepress exports."""
    inputs = {node.name: node for node in (*session.get_inputs(), *session.get_overridable_initializers())}
    outputs = {node.name: node for node in session.get_outputs()}
    for name in ("input_ids", "attention_mask", "logits_to_keep"):
        _check_kind(inputs, name, (_IDS,))
    _check_kind(outputs, "logits", _FLOATS)
    logits = outputs["logits"]
    if next(iter(outputs)) != "logits" or len(logits.shape) != 3 or not _is_side(logits.shape[2]):
        raise ValueError(f"its first output must be logits (batch, tokens, vocabulary), not {shown(logits.shape)}")
    caches: dict[str, tuple[int, int]] = {}
    int8 = any(name.startswith(CACHE) and node.type == _INT8 for name, node in inputs.items())
    kept = _INT8 if int8 else logits.type
    for name, node in inputs.items():
        if not name.startswith(CACHE):
            if name not in ("input_ids", "attention_mask", "logits_to_keep", "position_ids"):
                raise ValueError(f"it has an input {shown(name)}, which nothing feeds")
            continue
        _check_kind(inputs, name, (kept,))
        _check_kind(outputs, name.replace("past_key_values", "present"), (kept,))
        if len(node.shape) != 4 or not (_is_side(node.shape[1]) and _is_side(node.shape[3])):
            raise ValueError(f"{name} must be (batch, heads, past, head size), not {shown(node.shape)}")
        caches[name] = (node.shape[1], node.shape[3])
    presents = [name.replace("past_key_values", "present") for name in caches]
    if not caches or list(outputs)[1 : 1 + len(caches)] != presents:
        raise ValueError("behind logits must come one output for each input of the cache, in their order")
    return Signature(caches, logits.shape[2], logits.type == "tensor(float16)", int8)


def _check_kind(nodes: dict[str, onnxruntime.NodeArg], name: str, kinds: Iterable[str]) -> None:
    if name not in nodes:
        raise ValueError(f"it has no {name}")
    if nodes[name].type not in kinds:
        raise ValueError(f"{name} is {nodes[name].type}, not {' or '.join(kinds)}")


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_SIDE
