"""Round to nearest by its definition, and perplexities that were measured elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.quantize import rtn
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.text.windows import text_windows
from quantizing import Trained, job_of, matrices

BITS = (2, 3, 4, 8)


def weights_like(kind: str, rows: int = 12, columns: int = 172) -> np.ndarray:
    dice = np.random.default_rng(columns)
    weight = dice.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.05)
    if kind == "positive":
        weight = np.abs(weight) + np.float32(0.3)  # a range without zero would lose the exact zero
    elif kind == "negative":
        weight = -np.abs(weight) - np.float32(0.3)
    elif kind == "outlier":
        weight[:, ::50] *= 100
    elif kind == "sparse":
        weight[dice.random(weight.shape) < 0.5] = 0
        weight[3] = 0
        weight[4, 32:64] = 0
    elif kind == "constant":
        weight[:] = np.linspace(-0.4, 0.7, rows, dtype=np.float32)[:, None]
    elif kind == "tiny":
        weight *= np.float32(1e-30)
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "outlier", "sparse", "constant", "tiny"])
def test_rtn_is_within_half_a_step(kind: str, bits: int, symmetric: bool) -> None:
    """The definition: no code in reach lies nearer. A clipped end, a shifted zero point or mixed groups would show."""
    weight = weights_like(kind)
    linear = round_to_nearest("m", weight, bits, 32, symmetric)
    step = np.repeat(linear.scales, 32, axis=1)[:, :172]
    assert (np.abs(linear.dequantized() - weight) <= step * np.float32(0.5 + 2e-5)).all()
    assert (linear.zeros is None) == symmetric
    assert np.isfinite(linear.scales).all() and (linear.scales > 0).all()
    # and the step is no wider than the group's range asks for, but for its rounding: twice its largest weight, in 2^bits - 1 steps
    largest = np.pad(np.abs(weight), ((0, 0), (0, 20))).reshape(12, 6, 32).max(-1)
    assert (linear.scales[largest > 0] <= 2 * largest[largest > 0] / ((1 << bits) - 1) * 1.001).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["sparse", "positive", "negative"])
def test_rtn_keeps_zero(kind: str, bits: int, symmetric: bool) -> None:
    """Zero stays exactly zero, also among weights of one sign: pruned weights and padding must add nothing."""
    weight = weights_like(kind)
    weight[:, ::7] = 0
    restored = round_to_nearest("m", weight, bits, 32, symmetric).dequantized()
    assert (restored[weight == 0] == 0).all()
    if kind == "sparse":
        assert not restored[3].any() and not restored[4, 32:64].any()


@pytest.mark.parametrize("bits", BITS)
def test_rtn_constant_rows(bits: int) -> None:
    """A group of one value is an end of its range, which asymmetric codes hold but for the rounding of their scale."""
    weight = weights_like("constant")
    assert np.allclose(round_to_nearest("m", weight, bits, 32, False).dequantized(), weight, rtol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_more_bits_are_better(symmetric: bool) -> None:
    """Each width must be worth its bytes: every bit about halves the error."""
    weight = weights_like("normal", 64, 256)
    errors = [np.linalg.norm(round_to_nearest("m", weight, b, 64, symmetric).dequantized() - weight) for b in (8, 4, 3, 2)]
    assert errors[0] * 12 < errors[1] and errors[1] * 1.8 < errors[2] and errors[2] * 1.8 < errors[3]


def test_rtn_takes_every_matrix(tiny: Path) -> None:
    """The quantizer: all matrices of the blocks, options obeyed."""
    job = job_of(tiny, method="rtn", bits=2, group_size=16, symmetric=True)
    found = rtn.quantize(job)
    assert set(found) == set(job.linears) and len(found) == 28
    for name, weight in matrices(tiny).items():
        assert (found[name].name, found[name].bits, found[name].group_size) == (name, 2, 16)
        assert np.array_equal(found[name].codes, round_to_nearest(name, weight, 2, 16, True).codes)


@pytest.mark.parametrize(
    ("name", "full", "four", "three"), [("stories260k", 4.27, 4.90, 16.7), ("babyllama-361", 2.20, 2.28, 3.00)]
)
def test_known_perplexities(
    name: str, full: float, four: float, three: float, shared_model: Callable[[str], Path], tinystories: Path
) -> None:
    """Perplexities that were measured elsewhere: a wrong window, BOS or weight would move them.

    Round-to-nearest is no worse than the published values, which used a coarser symmetric scale.
    """
    folder = shared_model(name)
    trained = Trained(folder, text_windows(tinystories, folder, budget=16000))
    whole = trained.perplexity()
    assert whole == pytest.approx(full, rel=0.005)
    found = [trained.perplexity(trained.rounded(bits, 32)) for bits in (8, 4, 3)]
    assert found[0] == pytest.approx(whole, rel=0.005)
    assert whole * 1.005 < found[1] <= four
    assert found[1] * 1.1 < found[2] <= three


def test_rounded_weights_come_back_from_the_files(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the context the modules are rounded, afterwards what the checkpoint stores; no second copy of them is kept."""
    checkpoint, stored = Checkpoint(tiny), matrices(tiny)
    linears = block_linears(checkpoint.model())
    monkeypatch.setattr(torch.Tensor, "clone", None, raising=False)
    with rtn.rounded(linears, dict.fromkeys(linears, (4, 32)), stored=checkpoint.index):
        for name, module in linears.items():
            found = round_to_nearest(name, stored[name], 4, 32, False).dequantized()
            assert np.array_equal(module.weight.detach().numpy(), found)
    assert all(np.array_equal(module.weight.detach().numpy(), stored[name]) for name, module in linears.items())


def test_modules_that_share_a_weight_get_it_back() -> None:
    first, second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    weight = first.weight.detach().clone()
    with rtn.rounded({"a": first, "b": second}, {"a": (4, 32), "b": (4, 32)}):
        assert not torch.equal(first.weight, weight)
    assert torch.equal(first.weight, weight)


def test_weights_that_the_files_hold_otherwise_are_kept(tiny: Path) -> None:
    """A matrix that was changed, or renamed, in memory comes back as it was there."""
    checkpoint = Checkpoint(tiny)
    linears = block_linears(checkpoint.model())
    name, module = next(iter(linears.items()))
    with torch.no_grad():
        module.weight.mul_(2)
    doubled = module.weight.detach().clone()
    with rtn.rounded(linears, {name: (4, 32)}, stored=checkpoint.index):
        assert not torch.equal(module.weight, doubled)
    assert torch.equal(module.weight, doubled)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_in_other_blocks_is_the_same_row(symmetric: bool) -> None:
    """The embedding is gathered from blocks that divide its width, which one scale a row need not."""
    weight = np.random.default_rng(0).normal(size=(3, 1600)).astype(np.float32)
    row = round_to_nearest("m", weight, 8, -1, symmetric)
    other = row.in_blocks(64)
    assert (row.group_size, other.group_size, other.groups) == (64, 64, 25)
    assert np.array_equal(other.unpacked(), row.unpacked()) and np.array_equal(other.dequantized(), row.dequantized())
