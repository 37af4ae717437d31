"""Which parts of blocks write nothing: read from the weights alone, and left alone by quantizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.models.families import PARTS
from edgepress.pipeline import options, stages, vocabulary
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import parameters_left, part_name
from edgepress.pipeline.checkpoint.update import replace_tensors
from edgepress.pipeline.quantize.budget import ends_of
from edgepress.pipeline.tune.student import Student
from families import TINY, family_config
from transformers import LlamaConfig

ATTENTION, FEED_FORWARD = part_name(1, "attention"), part_name(2, "feed-forward")
Model = Callable[..., Path]


def zeroed(folder: Path, *matrices: str) -> Path:
    """The checkpoint with zeros for these tensors."""
    shapes = Checkpoint(folder).shapes
    replace_tensors(folder, {name: torch.zeros(shapes[name]) for name in matrices})
    return folder


@pytest.fixture
def model(random_model: Model, tmp_path: Path) -> Path:
    return random_model(LlamaConfig(**TINY), tmp_path / "model")


def test_the_options_name_the_parts_that_there_are() -> None:
    assert set(options.REMOVABLE) == {options.BLOCKS, *PARTS} == set(vocabulary.PARTS)


def test_an_output_of_zeros_is_a_silent_part(model: Path) -> None:
    zeroed(model, f"{ATTENTION}.o_proj.weight", f"{FEED_FORWARD}.down_proj.weight", f"{part_name(0, 'attention')}.q_proj.weight")
    assert Checkpoint(model).silent == {ATTENTION, FEED_FORWARD}


def test_one_number_that_is_not_zero_keeps_a_part(model: Path) -> None:
    shape = Checkpoint(model).shapes[f"{ATTENTION}.o_proj.weight"]
    almost = torch.zeros(shape)
    almost[-1, -1] = 1e-30
    replace_tensors(model, {f"{ATTENTION}.o_proj.weight": almost})
    assert Checkpoint(model).silent == frozenset()


def test_zeros_with_a_sign_are_zeros(model: Path) -> None:
    """As multiplying by zero leaves them, and a GGUF file of Q4_0."""
    name = f"{ATTENTION}.o_proj.weight"
    replace_tensors(model, {name: -torch.zeros(Checkpoint(model).shapes[name])})
    assert Checkpoint(model).silent == {ATTENTION}


def test_a_bias_keeps_a_part(random_model: Model, tmp_path: Path) -> None:
    model = random_model(LlamaConfig(**TINY, attention_bias=True), tmp_path / "biased")
    zeroed(model, f"{ATTENTION}.o_proj.weight")
    assert Checkpoint(model).silent == frozenset()
    zeroed(model, f"{ATTENTION}.o_proj.bias")
    assert Checkpoint(model).silent == {ATTENTION}


def test_blocks_of_other_architectures_have_no_parts(random_model: Model, tmp_path: Path) -> None:
    model = random_model(family_config("gpt2"), tmp_path / "gpt2")
    zeroed(model, "transformer.h.1.attn.c_proj.weight", "transformer.h.1.attn.c_proj.bias")
    assert Checkpoint(model).silent == frozenset()


def test_parameters_are_counted_without_silent_parts(model: Path) -> None:
    whole = Checkpoint(model).meta_model().num_parameters()
    zeroed(model, f"{FEED_FORWARD}.down_proj.weight")
    checkpoint = Checkpoint(model)
    gone = 3 * TINY["hidden_size"] * TINY["intermediate_size"]
    assert parameters_left(checkpoint.meta_model(), checkpoint.silent) == whole - gone


@pytest.mark.parametrize("method", ["rtn", "int8"])
def test_quantizers_leave_a_silent_part_as_it_is(model: Path, tmp_path: Path, method: str) -> None:
    """Else its zeros would ship, as codes."""
    zeroed(model, f"{ATTENTION}.o_proj.weight")
    made = stages.run("quantize", Artifact.load(model), tmp_path / "packed", options.QuantizeOptions(method=method, group_size=32))
    packed = Checkpoint(made.path)
    assert packed.silent == {ATTENTION}
    matrices = {name for name in packed.weights.matrices if "layers" in name}
    assert len(matrices) == 7 * TINY["num_hidden_layers"] - 4 and not any(name.startswith(ATTENTION) for name in matrices)
    assert made.steps[-1].facts["kept_float"] == []


@pytest.mark.families
def test_gptq_leaves_a_silent_part_as_it_is(model: Path, tmp_path: Path, text: Path) -> None:
    zeroed(model, f"{ATTENTION}.o_proj.weight")
    wish = options.QuantizeOptions(group_size=32, calibration=text, calibration_tokens=512)
    packed = Checkpoint(stages.run("quantize", Artifact.load(model), tmp_path / "packed", wish).path)
    assert packed.silent == {ATTENTION} and not any(name.startswith(ATTENTION) for name in packed.weights.matrices)


def test_a_silent_part_stays_so_when_channels_go(model: Path, tmp_path: Path, text: Path) -> None:
    """Nothing can be fitted where nothing enters."""
    zeroed(model, *(f"{FEED_FORWARD}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")))
    wish = options.NarrowOptions(remove_channels=0.5, calibration=text, calibration_tokens=4096)
    narrowed = Checkpoint(stages.run("narrow", Artifact.load(model), tmp_path / "narrow", wish).path)
    assert narrowed.silent == {FEED_FORWARD} and narrowed.config.intermediate_size < TINY["intermediate_size"]


def test_tuning_trains_nothing_of_a_silent_part(random_model: Model, tmp_path: Path) -> None:
    """A bias that moved would bring it back."""
    model = random_model(LlamaConfig(**TINY, attention_bias=True), tmp_path / "biased")
    zeroed(model, f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.o_proj.bias")
    wish = options.QuantizeOptions(method="rtn", group_size=32)
    packed = stages.run("quantize", Artifact.load(model), tmp_path / "packed", wish)
    trained = {name for name, _ in Student(Checkpoint(packed.path)).trained()}
    assert f"{part_name(0, 'attention')}.o_proj.bias" in trained and not any(name.startswith(ATTENTION) for name in trained)


def test_a_size_is_planned_without_silent_parts(model: Path) -> None:
    """The bytes that --max-size expects are those of the artifact, which has no silent part."""

    def rest() -> int:
        checkpoint = Checkpoint(model)
        model_of = checkpoint.model()
        linears = block_linears(model_of)
        return ends_of(checkpoint, model_of, sorted(linears.keys() - checkpoint.spared(linears))).rest

    whole = rest()
    zeroed(model, f"{FEED_FORWARD}.down_proj.weight", f"{ATTENTION}.o_proj.weight")
    assert 0 <= whole - rest() < 2000  # fewer rules of matrices in the manifest
