"""`--max-size`: the exported folder keeps to it, as nearly as the forms allow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact, Step, write_manifest
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import ExportOptions, ImportOptions, QuantizeOptions, size_in_bytes
from edgepress.pipeline.quantize import choose, trials
from edgepress.pipeline.quantize.budget import Costs, carried, ends_of, fit, largest_size, least_size
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS
from edgepress.pipeline.quantize.mix import FORMS, HEAD_GROUP, Form, Item
from families import TINY
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from transformers import Gemma3TextConfig, LlamaConfig


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text."""
    monkeypatch.setattr(trials, "TRIAL_TOKENS", 256)
    monkeypatch.setattr(trials, "COST_TOKENS", 512)
    monkeypatch.setattr(trials, "WINDOW", 32)


SHAPE = {**TINY, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 320}
MODELS = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "two ends": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "a long context": LlamaConfig(**SHAPE | {"max_position_embeddings": 131072}, tie_word_embeddings=True),
    "two kinds of positions": Gemma3TextConfig(**SHAPE | {"head_dim": 32, "max_position_embeddings": 8192}, sliding_window=64),
}


SLACK = 30_000  # bytes of graph, configs and manifest, which are estimated


def whole_bytes(folder: Path) -> int:
    """Of all that a user ships, the manifest too."""
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "tied" else pytest.mark.families) for name in MODELS])
def test_the_artifact_keeps_to_its_size(
    name: str, quick: None, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """And weighs what was said; beyond what 8 bits take it has no use for more."""
    source = Artifact.load(random_model(MODELS[name], tmp_path / "model"))

    def made(size: int) -> int:
        chosen = choose.choose(source, QuantizeOptions(method="rtn", max_size=f"{size}B"))
        packed = stages.run("quantize", source, tmp_path / f"packed-{size}", chosen.options)
        weighs = whole_bytes(stages.run("export", packed, tmp_path / f"onnx-{size}", ExportOptions(text=text)).path)
        assert -50_000 <= 1e6 * float(chosen.because.partition(" MB")[0]) - weighs <= SLACK + 50_000  # it says tenths of a MB
        return weighs

    largest = made(10**9)
    size = int(0.93 * largest)
    assert made(size) <= size < largest
    with pytest.raises(OptionError, match=r"is less than the .* MB that its matrices alone have"):
        made(100_000)


def test_what_stays_is_counted_as_it_ships(tiny: Path, text: Path, tmp_path: Path) -> None:
    """All but graph and manifest to the byte: files that no tokenizer has, too."""
    tiny = shutil.copytree(tiny, tmp_path / "model")
    (tiny / "LICENSE").write_text("It is yours. " * 9000)
    (tiny / "added.json").write_text("[" + "1," * 60_000 + "1]")
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32))
    made = stages.run("export", packed, tmp_path / "onnx", ExportOptions(text=text)).path
    checkpoint = Checkpoint(packed.path)
    names = [name for name in checkpoint.weights.matrices if ".layers." in name]
    ends = ends_of(Checkpoint(tiny), Checkpoint(tiny).model(), names)
    blocks = sum(linear.nbytes for name in names if (linear := checkpoint.weights.packed(name)))
    assert 0 <= blocks + ends.bytes(EIGHT_BITS, 32) + ends.rest - whole_bytes(made) <= SLACK


@pytest.mark.families
def test_a_size_that_is_not_kept_to_is_told(
    tiny: Path, quick: None, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With what is too much."""
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", max_size="0.9MB"))
    manifest = packed.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_bytes": 900000', '"max_bytes": 700000'))
    made = stages.run("export", Artifact.load(packed.path), tmp_path / "onnx", ExportOptions(text=text))
    (told,) = [record.getMessage() for record in caplog.records if "--max-size" in record.getMessage()]
    lower = float(told.rpartition("--max-size ")[2].partition("MB")[0])
    assert lower - 0.12 <= whole_bytes(made.path) / 1e6 - 0.7 <= lower + 0.01


def item(cost: float) -> Item:
    costs = {form: cost * 4.0**-form.bits * form.group_size**0.3 for form in FORMS}
    return Item(("a",), 64 * 64, costs, {form: 64 * (64 * form.bits // 8 + 2 * (64 // min(form.group_size, 64))) for form in FORMS})


def test_the_head_gives_way_where_it_costs_least(tiny: Path) -> None:
    """Bits go where they win most: to the head, or to the blocks."""
    names = [name for name in Checkpoint(tiny).weights.names if "proj" in name]
    ends = ends_of(Checkpoint(tiny), Checkpoint(tiny).model(), [name.removesuffix(".weight") for name in names])
    items = (item(1.0),) * 40
    four = ends.bytes(FOUR_BITS, 64) + ends.rest + sum(row.bytes[Form(8, 64)] for row in items)
    assert fit(Costs(items, ends, {EIGHT_BITS: 0.0, FOUR_BITS: 1e-9}), four).head == FOUR_BITS
    eight = ends.bytes(EIGHT_BITS, 64) + ends.rest + sum(row.bytes[Form(4, 64)] for row in items)
    assert fit(Costs(items, ends, {EIGHT_BITS: 0.0, FOUR_BITS: 9.0}), eight).head == EIGHT_BITS


def test_no_bytes_are_left_that_would_win_something(tiny: Path) -> None:
    """Whatever the size: the head's blocks do not wait for what most matrices get, which waits for the head's bytes."""
    ends = ends_of(Checkpoint(tiny), Checkpoint(tiny).model(), [])
    costs = Costs((item(1.0),) * 40, ends, {EIGHT_BITS: 0.0})
    sizes = np.linspace(least_size(costs), largest_size(costs), 12)[:-1]
    for size in sizes:
        found = fit(costs, int(size))
        paid = ends.rest + ends.bytes(found.head, HEAD_GROUP)
        paid += sum(row.bytes[form] for row, form in zip(costs.items, found.forms, strict=True))
        assert paid == found.size <= size
        better = [
            row.bytes[other] - row.bytes[form]
            for row, form in zip(costs.items, found.forms, strict=True)
            for other in FORMS
            if row.costs[other] < row.costs[form]
        ]
        assert min(better) > size - found.size


@pytest.mark.parametrize(("given", "size"), [("90MB", 90 * 10**6), ("1.2 GB", 1_200_000_000), ("64MiB", 64 << 20), ("5000B", 5000)])
def test_sizes(given: str, size: int) -> None:
    assert size_in_bytes(given, "--max-size") == size


@pytest.mark.parametrize("given", ["", "MB", "-5MB", "90 furlongs", "1e3MB", "0MB", "nan", "9" * 400, "9" * 400 + "GB"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(OptionError, match="--max-size takes a size"):
        QuantizeOptions(max_size=given)
    for ends in ({"head_bits": 16}, {"embedding_bits": 8}):
        with pytest.raises(OptionError, match="--max-size chooses the bits of head and embedding"):
            QuantizeOptions(max_size="5MB", **ends)
    with pytest.raises(OptionError, match="leave one out"):
        QuantizeOptions(max_size="5MB", target_bits=4.5)


def test_codes_that_are_kept_weigh_what_they_do(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Blocks and ends of a GGUF file: nothing is left to choose, and the artifact is known but for its graph."""
    write_gguf(tiny, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    made = stages.run("import", Artifact.load(tmp_path / "model.gguf"), tmp_path / "codes", ImportOptions(keep_codes=True))
    exported = stages.run("export", made, tmp_path / "onnx", ExportOptions(accuracy_level="0", text=text)).path
    checkpoint = Checkpoint(made.path)
    ends = ends_of(checkpoint, checkpoint.model(), [])
    assert not ends.shapes and 0 <= ends.rest - whole_bytes(exported) <= SLACK


def test_costs_are_known_of_a_copy(tiny: Path, text: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that prunes nothing quantizes a copy of what was planned, with another manifest; what ships beside is counted."""
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    options = QuantizeOptions(method="rtn", calibration=text)
    planned = trials.costs_of(Artifact.load(tiny), options)
    shutil.copytree(tiny, tmp_path / "copy")
    (tmp_path / "copy" / "influence.json").write_text("{}")
    write_manifest(tmp_path / "copy", "hf", (Step("prune", {}, {}, 1.0, {}),), "of another")
    copy = Artifact.load(tmp_path / "copy")
    assert copy.identity() != Artifact.load(tiny).identity()  # it tells of influences
    monkeypatch.setattr(trials, "Trial", None)
    found = trials.costs_of(copy, options)
    assert found.items == planned.items and found.head == planned.head
    assert found.ends.rest - planned.ends.rest == carried(Checkpoint(copy.path)) - carried(Checkpoint(tiny)) > 0
    shutil.copytree(tiny, tmp_path / "another")
    (tmp_path / "another" / "config.json").write_text((tiny / "config.json").read_text() + " ")
    with pytest.raises(TypeError):  # another model, for all that is known
        trials.costs_of(Artifact.load(tmp_path / "another"), options)
