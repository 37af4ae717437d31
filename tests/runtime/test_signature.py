"""A graph with other inputs and outputs than edgepress exports is refused when it is loaded, by the name that differs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from edgepress.pipeline.runtime.signature import Signature, signature_of

Node = tuple[str, str, list[object]]
CACHE = ["batch", 2, "past", 16]


def session(**changes: Node | None) -> SimpleNamespace:
    """A session's three lists; a change replaces the node of its name, or leaves it out."""
    inputs: dict[str, Node] = {
        "input_ids": ("input_ids", "tensor(int64)", ["batch", "tokens"]),
        "attention_mask": ("attention_mask", "tensor(int64)", ["batch", "total"]),
        "key": ("past_key_values.0.key", "tensor(float)", CACHE),
        "value": ("past_key_values.0.value", "tensor(float)", CACHE),
    }
    outputs: dict[str, Node] = {
        "logits": ("logits", "tensor(float)", ["batch", 1, 512]),
        "present_key": ("present.0.key", "tensor(float)", CACHE),
        "present_value": ("present.0.value", "tensor(float)", CACHE),
    }
    overridable: dict[str, Node] = {"logits_to_keep": ("logits_to_keep", "tensor(int64)", [1])}
    tables = []
    for table in (inputs, overridable, outputs):
        nodes = [changes.get(key, node) for key, node in table.items()]
        tables.append([SimpleNamespace(name=node[0], type=node[1], shape=node[2]) for node in nodes if node])
    named = zip(("get_inputs", "get_overridable_initializers", "get_outputs"), tables, strict=True)
    return SimpleNamespace(**{name: lambda nodes=nodes: nodes for name, nodes in named})


def test_what_edgepress_exports() -> None:
    caches = {"past_key_values.0.key": (2, 16), "past_key_values.0.value": (2, 16)}
    assert signature_of(session()) == Signature(caches, 512, half=False, int8=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logits_to_keep": None}, "no logits_to_keep"),
        ({"logits": ("other", "tensor(float)", ["batch", 1, 512])}, "no logits"),
        ({"logits": ("logits", "tensor(float)", ["batch", 1, "vocabulary"])}, "first output"),
        ({"logits": ("logits", "tensor(double)", ["batch", 1, 512])}, "logits is tensor"),
        ({"input_ids": ("input_ids", "tensor(int32)", ["batch", "tokens"])}, "input_ids is tensor"),
        ({"key": ("past_key_values.0.key", "tensor(float)", ["batch", None, "past", 16])}, "must be"),
        ({"key": ("past_key_values.0.key", "tensor(float)", ["batch", 2, "past"])}, "must be"),
        ({"key": ("past_key_values.0.key", "tensor(float)", ["batch", 1 << 40, "past", 16])}, "must be"),
        ({"key": ("past_key_values.0.key", "tensor(float16)", CACHE)}, "past_key_values.0.key is tensor"),
        ({"key": ("past_key_values.0.key", "tensor(int8)", CACHE)}, "present.0.key is tensor.float., not tensor.int8."),
        ({"key": ("memory", "tensor(float)", CACHE)}, "nothing feeds"),
        ({"present_key": None}, "no present.0.key"),
    ],
)
def test_what_differs_is_named(changes: dict[str, Node | None], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        signature_of(session(**changes))
