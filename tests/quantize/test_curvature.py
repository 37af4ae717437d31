"""The second-order estimate of what rounding costs, against the cost itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline import machine
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.metrics.torch_scores import divergences
from edgepress.pipeline.quantize import curvature
from edgepress.pipeline.quantize.curvature import Errors, costs
from edgepress.pipeline.quantize.rtn import rounded
from families import family_config
from transformers import PreTrainedModel

FORM = (4, 32)


@pytest.fixture(scope="module")
def model(tiny: Path) -> PreTrainedModel:
    return Checkpoint(tiny).model()


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(1, 5000, size=(128, 24)))


@pytest.fixture(scope="module")
def estimated(model: PreTrainedModel, windows: list[np.ndarray]) -> tuple[Errors, dict[str, float]]:
    errors = Errors(model, *FORM)
    return errors, costs(model, errors, windows)


@pytest.mark.parametrize("kind", ["q_proj", "down_proj", "layers.0.", "proj"])
def test_the_estimate_is_near_the_divergence(
    kind: str, model: PreTrainedModel, windows: list[np.ndarray], estimated: tuple[Errors, dict[str, float]]
) -> None:
    errors, by_name = estimated
    names = [name for name in errors.modules if kind in name]
    ids = torch.from_numpy(np.stack(windows[:32]))
    with torch.inference_mode():
        original = model(input_ids=ids).logits.flatten(0, 1)
        with rounded(errors.modules, dict.fromkeys(names, FORM)):
            cost = float(divergences(original, model(input_ids=ids).logits.flatten(0, 1)).mean())
    assert sum(by_name[name] for name in names) == pytest.approx(cost, rel=0.25)


def test_matrices_that_read_one_input_are_together(estimated: tuple[Errors, dict[str, float]]) -> None:
    groups = {tuple(name.rpartition(".")[2] for name in names) for names in estimated[0].together}
    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert len(estimated[0].together) == 16


@pytest.mark.parametrize("has", [True, False])
def test_a_model_that_nobody_needs_any_more_costs_the_same(
    has: bool, tiny: Path, windows: list[np.ndarray], estimated: tuple[Errors, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its matrices are halved, its norms and tables of angles are not: the pass itself computes in bfloat16."""
    monkeypatch.setattr(curvature, "prefers_bfloat16", lambda: has)
    model = Checkpoint(tiny).model()
    spent = costs(model, Errors(model, *FORM, spent=True), windows)
    assert sum(spent.values()) == pytest.approx(sum(estimated[1].values()), rel=0.05)
    if has:
        assert {p.ndim for p in model.parameters() if p.dtype == torch.bfloat16} == {2}
        assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_the_model_is_left_as_it_was(tiny: Path, model: PreTrainedModel, estimated: tuple[Errors, dict[str, float]]) -> None:
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, Checkpoint(tiny).model()(input_ids=ids).logits)


def test_the_head_by_rows_and_few_windows_at_a_time(
    tiny: Path, windows: list[np.ndarray], estimated: tuple[Errors, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same costs: the tokens that are drawn are those of any other number of rows."""
    monkeypatch.setattr(machine, "_FEWEST", 16)
    monkeypatch.setattr(machine, "_LOGITS", 1)
    monkeypatch.setattr(machine, "_IN_CACHE", 8 * 5120)
    model, sizes = Checkpoint(tiny).model(), set[int]()
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: sizes.add(output.shape[1]))
    by_name = costs(model, Errors(model, *FORM), windows)
    assert by_name == pytest.approx(estimated[1], rel=1e-3) and max(sizes) == 16
    monkeypatch.setattr(curvature, "_KEPT", 1)
    model, sizes = Checkpoint(tiny).model(), set()
    decoder_blocks(model)[1][0].register_forward_hook(lambda _, args, output: sizes.add(len(args[0])))
    assert costs(model, Errors(model, *FORM), windows) == pytest.approx(estimated[1], rel=1e-3) and sizes == {1}


def test_blocks_that_join_windows_and_tokens(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """OPT's feed-forward reads a matrix of all tokens of all windows."""
    model = Checkpoint(random_model(family_config("opt"), tmp_path / "opt")).model()
    errors = Errors(model, *FORM)
    by_name = costs(model, errors, list(np.random.default_rng(0).integers(1, 5000, size=(8, 16))))
    assert by_name.keys() == errors.modules.keys() and min(by_name.values()) > 0
