"""What an artifact will weigh, and the mix of bits that fits: ``--max-size``.

The bytes of the exported folder are those of the packed matrices, of what stays float, of the tables of positions, of the graph, of
the files that go with a model, and of the manifest; all but graph and manifest, which are small, are known before anything is
quantized.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from edgepress.models.families import head_size
from edgepress.pipeline.checkpoint.blocks import block_matrices, decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import within
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import MANIFEST, JsonObject, folder_bytes
from edgepress.pipeline.options import QuantizeOptions, size_in_bytes
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS, Head, group_of
from edgepress.pipeline.quantize.mix import EIGHT, FORMS, HEAD_GROUP, Form, Item, bytes_of, solve
from transformers import PreTrainedModel

# A table of positions from this size on is made of two small ones (exporters/graph/rotary.py).
_LONG_TABLE, _STEP = 2**22, 256
# Of model.onnx, whose nodes grow with the layers: what four models have, rounded up.
_GRAPH, _GRAPH_LAYER = 20_000, 5_300
# What quantize and export add to the manifest, with the rule of a matrix, and export's own configs beside a copy of the model's.
_FACTS, _RULE, _CONFIGS = 6_000, 110, 2_500
# Of costs that were kept: raised where ``ends_of`` counts otherwise, or a head is measured otherwise.
COUNTING = 10
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Ends:
    """Embedding and output head: shapes of those that get a form, the head's last, one matrix where they are tied; and the rest.

    rest: bytes of the artifact besides all matrices that get a form. with_head: whether the head is among the shapes.
    """

    shapes: tuple[tuple[int, int], ...]
    rest: int
    with_head: bool = True

    @property
    def vocabulary(self) -> int:
        """Rows of the head; 0 where it gets no bits here."""
        return self.shapes[-1][0] if self.with_head and self.shapes and group_of(self.shapes[-1][1], HEAD_GROUP) else 0

    def bytes(self, head: Head, group_size: int) -> int:
        """As ``pack`` stores them, in blocks that divide the width; an embedding of its own has no rare rows."""
        total = 0
        for number, (rows, columns) in enumerate(self.shapes):
            group = group_of(columns, group_size)
            form = head if self.with_head and number == len(self.shapes) - 1 else Head(head.bits)
            total += rows * columns * 4 if group is None else form.bytes(rows, columns, group)
        return total


@dataclass(frozen=True)
class Costs:
    """What there is to choose from: the block matrices, the two ends, and what a head of some bits costs, nats a token."""

    items: tuple[Item, ...]
    ends: Ends
    head: dict[Head, float]

    def beside(self, files: int) -> Costs:
        """The same with so many more bytes of other files in the artifact."""
        return replace(self, ends=replace(self.ends, rest=self.ends.rest + files))

    def to_json(self) -> JsonObject:
        """For the cache folder."""
        rows = [
            {
                "names": item.names, "weights": item.weights, "costs": {str(form): cost for form, cost in item.costs.items()},
                "bytes": {str(form): size for form, size in item.bytes.items()},
            }
            for item in self.items
        ]  # fmt: skip
        return {
            "items": rows,
            "shapes": self.ends.shapes,
            "rest": self.ends.rest,
            "with_head": self.ends.with_head,
            "head": [[head.bits, head.rare, cost] for head, cost in self.head.items()],
        }

    @classmethod
    def from_json(cls, content: JsonObject) -> Costs:
        """Raises KeyError, TypeError or ValueError for what ``to_json`` did not write."""
        items = tuple(
            Item(tuple(row["names"]), int(row["weights"]), _by_form(row["costs"], float), _by_form(row["bytes"], int))
            for row in content["items"]
        )
        ends = Ends(
            tuple((int(rows), int(columns)) for rows, columns in content["shapes"]),
            int(content["rest"]),
            bool(content["with_head"]),
        )
        heads = {Head(int(bits), tuple(map(str, rare))): float(cost) for bits, rare, cost in content["head"]}
        return cls(items, ends, heads)


def _by_form(values: JsonObject, kind: type[Number]) -> dict[Form, Number]:
    known = {str(form): form for form in FORMS}
    return {known[name]: kind(value) for name, value in values.items()}


@dataclass(frozen=True)
class Fit:
    """The head and a form for each item; cost: KL expected, nats a token. size: of the artifact, bytes."""

    head: Head
    forms: list[Form]
    cost: float
    size: int


def ends_of(checkpoint: Checkpoint, model: PreTrainedModel, chosen: Sequence[str]) -> Ends:
    """chosen: names of the block matrices that get a form; those of a GGUF file that keep their codes weigh what they do."""
    kept = {id(model.get_submodule(name).weight): name for name in checkpoint.weights.matrices}
    ends = {weight: shape for weight, shape in _shapes_of_ends(model).items() if weight not in kept}
    taken = {id(model.get_submodule(name).weight) for name in chosen} | ends.keys() | kept.keys()
    codes = sum(linear.nbytes for name in kept.values() if (linear := checkpoint.weights.packed(name)) is not None)
    taken |= {id(parameter) for name, parameter in model.named_parameters() if within(checkpoint.silent, name)}  # left out
    floats = sum(4 * parameter.numel() for parameter in model.parameters() if id(parameter) not in taken)
    files = carried(checkpoint) + _FACTS + _RULE * len(chosen) + _CONFIGS
    graph = _GRAPH + (_GRAPH_LAYER + _scales(model)) * checkpoint.layers
    with_head = id(model.get_output_embeddings().weight) not in kept
    return Ends(tuple(ends.values()), floats + codes + _tables(model) + files + graph, with_head)


def _scales(model: PreTrainedModel) -> int:
    """Bytes of a layer's scales of an int8 cache, in case that it gets one (exporters/int8_cache.py)."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    return 2 * 4 * heads * head_size(config) if heads else 0


def _shapes_of_ends(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Id of the weight -> its shape, of embedding and output head; of a matrix that is both, once."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    if model.config.tie_word_embeddings:
        modules.pop()
    return {id(module.weight): (module.weight.shape[0], module.weight.shape[1]) for module in modules}


def carried(checkpoint: Checkpoint) -> int:
    """Bytes of the files that go with the model: tokenizer, template, licence and the like, its config and its manifest so far."""
    with tempfile.TemporaryDirectory() as folder:
        carry_files(checkpoint.path, Path(folder), checkpoint.trust_remote_code)
        copied = folder_bytes(Path(folder))
    own = (checkpoint.path / name for name in ("config.json", MANIFEST))
    return copied + sum(file.stat().st_size for file in own if file.is_file())


def _tables(model: PreTrainedModel) -> int:
    """Bytes of the cosines and sines of all positions, for each kind of rotary embedding."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", 0)
    kinds: set[tuple[int, float]] = set()
    for name, module in model.named_modules():
        if "rotary" in name:
            kinds |= {(buffer.numel(), float(buffer.double().sum())) for _, buffer in module.named_buffers() if buffer.ndim == 1}
    total = 0
    for size, _ in kinds:
        table = 4 * positions * size
        total += 2 * (table if table < _LONG_TABLE or positions % _STEP else 4 * size * (_STEP + positions // _STEP))
    return total


def check_possible(source: Path, options: QuantizeOptions, layers: int | None) -> None:
    """Raise OptionError for a ``max_size`` that nothing could keep to: known from shapes, before anything is measured.

    layers: how many stay at least, None for all. The bound is that of the matrices alone, at the fewest bits.
    """
    checkpoint = Checkpoint(source, options.trust_remote_code)
    model = checkpoint.meta_model()
    matrices, _ = block_matrices(model)
    blocks = dict.fromkeys(range(checkpoint.layers), 0)
    place = decoder_blocks(model)[0].count(".") + 1
    for name in matrices.keys() - checkpoint.spared(matrices):
        blocks[int(name.split(".")[place])] += min(bytes_of(*matrices[name], form, options.symmetric) for form in FORMS)
    ends = Ends(tuple(_shapes_of_ends(model).values()), 0)
    least = sum(sorted(blocks.values())[:layers]) + ends.bytes(FOUR_BITS, HEAD_GROUP)
    assert options.max_size is not None
    if checkpoint.weights.matrices or least <= size_in_bytes(options.max_size, "--max-size"):
        return
    raise OptionError(
        f"--max-size {options.max_size} is less than the {least / 1e6:.1f} MB that its matrices alone have at 2 bits; give more "
        "(edgepress plan says what is possible)"
    )


def least_size(costs: Costs) -> int:
    """Bytes of the smallest artifact."""
    ends = min(costs.ends.bytes(head, HEAD_GROUP) for head in costs.head)
    return sum(min(item.bytes.values()) for item in costs.items) + ends + costs.ends.rest


def largest_size(costs: Costs) -> int:
    """Bytes of the artifact with 8 bits everywhere."""
    return sum(item.bytes[EIGHT] for item in costs.items) + costs.ends.bytes(EIGHT_BITS, HEAD_GROUP) + costs.ends.rest


def fit(costs: Costs, size: int, forms: Sequence[Form] = FORMS) -> Fit:
    """The head, and of the forms those, of least cost whose artifact has at most ``size`` bytes.

    Raises OptionError that names the least size where nothing fits.
    """
    fits = [found for head, cost in costs.head.items() if (found := _with_head(costs, head, cost, size, forms)) is not None]
    if not fits:
        least = least_size(costs)
        raise OptionError(
            f"the smallest artifact of this model has {least / 1e6:.1f} MB, at 2 bits; give --max-size {math.ceil(least / 1e6)}MB "
            "or more, remove layers (--remove-count) or channels (--remove-channels), or trim its vocabulary (edgepress trim)"
        )
    return min(fits, key=lambda found: (found.cost, found.size))


def _with_head(costs: Costs, head: Head, head_cost: float, size: int, among: Sequence[Form]) -> Fit | None:
    """The best with a head, None where none fits."""
    items, ends = costs.items, costs.ends.bytes(head, HEAD_GROUP) + costs.ends.rest
    left = size - ends
    if left < sum(min(item.bytes.values()) for item in items):
        return None
    forms = solve(items, among, size=left)
    chosen = list(zip(items, forms, strict=True))
    cost = head_cost + sum(item.costs[form] for item, form in chosen)
    return Fit(head, forms, cost, ends + sum(item.bytes[form] for item, form in chosen))
