"""GPTQ block by block: the algorithm against its definition and against gptqmodel, the order of the work, and resumption."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter, UserDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import forwards, stream
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.stream import Stream
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import gptq, inputs, settled
from edgepress.pipeline.quantize.inputs import DAMPING, Input, inverse_factor
from edgepress.pipeline.quantize.isolated import Begun
from edgepress.pipeline.quantize.job import JOB, QuantizeJob
from edgepress.pipeline.quantize.plan import WINDOW
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.stages import run
from edgepress.pipeline.text.windows import text_windows
from families import TINY, family_config
from patience import HUNG
from quantizing import Trained, job_of, matrices
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def problem(rows: int = 48, columns: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Hessian of inputs that have to do with one another."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(2048, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def solved(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, symmetric: bool = False) -> PackedLinear:
    """By the order in which the stage takes columns."""
    order = gptq.group_order(hessian.diagonal(), group)
    return gptq.quantized("m", weight, gptq.inverse_factor(hessian[order][:, order]), order, bits, group, symmetric)


def lost(linear: PackedLinear, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """The squared error of the output over all inputs."""
    off = torch.from_numpy(linear.dequantized()).double() - weight.double()
    return float(torch.trace(off @ hessian.double() @ off.T))


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem()
    factor = gptq.inverse_factor(hessian).double()
    damped = hessian.double() + gptq.DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(len(hessian)).double(), atol=1e-4)


def test_a_hessian_without_an_inverse_is_damped_until_it_has_one() -> None:
    """Fewer tokens than inputs, and rounding that makes it worse than singular."""
    hessian = torch.ones(32, 32)
    hessian.diagonal().sub_(0.2)
    assert bool(torch.isfinite(gptq.inverse_factor(hessian)).all())


def test_a_broken_hessian_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        gptq.inverse_factor(torch.full((4, 4), torch.nan))


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 64, False), (4, 32, True), (3, 128, False), (2, 16, False), (8, -1, True)]
)
def test_less_is_lost_than_by_rounding(bits: int, group: int, symmetric: bool) -> None:
    weight, hessian = problem()
    ours = solved(weight, hessian, bits, group, symmetric)
    rounded = round_to_nearest("m", weight.numpy(), bits, group, symmetric)
    assert (ours.bits, ours.group_size, ours.shape) == (rounded.bits, rounded.group_size, rounded.shape)
    assert (ours.zeros is None) == symmetric
    assert lost(ours, weight, hessian) < 0.8 * lost(rounded, weight, hessian)


def test_by_definition() -> None:
    """Algorithm 1 column by column in float64 with the inverse itself, on the same grids: the same codes, but for ties."""
    weight, hessian = problem(16, 96)
    linear = gptq.quantized("m", weight, gptq.inverse_factor(hessian), torch.arange(96), 4, 32)
    damped = hessian.double() + gptq.DAMPING * hessian.double().diagonal().mean() * torch.eye(96)
    inverse, left = torch.linalg.inv(damped), weight.double().clone()
    codes = torch.empty(16, 96)
    assert linear.zeros is not None
    scales, zeros = torch.from_numpy(linear.scales).double(), torch.from_numpy(linear.zeros).double()
    for k in range(96):
        scale, zero = scales[:, k // 32], zeros[:, k // 32]
        codes[:, k] = ((left[:, k] / scale).round() + zero).clamp(0, 15)
        error = (left[:, k] - (codes[:, k] - zero) * scale) / inverse[0, 0]
        left[:, k:] -= error[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
    assert np.mean(linear.unpacked() == codes.numpy()) > 0.998


def test_a_cut_range_loses_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one large weight in a group the others would have few codes."""
    weight, hessian = problem()
    weight[:, ::64] *= 4
    cut = lost(solved(weight, hessian, 3, 64), weight, hessian)
    monkeypatch.setattr(gptq, "SHARES", (1.0,))
    assert cut < 0.9 * lost(solved(weight, hessian, 3, 64), weight, hessian)


@pytest.mark.parametrize("columns", [128, 172])
def test_columns_of_great_inputs_first(columns: int) -> None:
    """Whole groups, a short one last; what is rounded first loses least in the end, and nothing is stored of the order."""
    weight, hessian = problem(48, columns)
    factors = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    hessian *= factors[:, None] * factors
    order = gptq.group_order(hessian.diagonal(), 32)
    assert order.sort().values.tolist() == list(range(columns))
    groups = [set((order[first : first + 32] // 32).tolist()) for first in range(0, columns, 32)]
    assert all(len(group) == 1 for group in groups) and (columns == 128 or groups[-1] == {5})
    diagonal = hessian.diagonal()[order]
    assert all(bool((diagonal[i : i + 32].diff() <= 0).all()) for i in range(0, columns, 32))
    found = solved(weight, hessian, 4, 32)
    natural = gptq.quantized("m", weight, gptq.inverse_factor(hessian), torch.arange(columns), 4, 32)
    assert found.permutation is None and lost(found, weight, hessian) < 0.97 * lost(natural, weight, hessian)


@pytest.mark.parametrize(
    ("noise", "tokens", "least", "most"), [(0.0, 2048, 0.95, 1.0), (1.0, 2048, 0.8, 1.0), (1.0, 160, 0.0, 0.4)]
)
def test_what_an_input_lacks_is_made_up_for_as_far_as_that_carries_over(
    noise: float, tokens: int, least: float, most: float
) -> None:
    """Least squares of many tokens are taken, and little of what so few propose that they follow chance."""
    generator = torch.Generator().manual_seed(0)
    weight, change = torch.randn(48, 128, generator=generator), torch.randn(128, 128, generator=generator) / 128**0.5 / 4
    original = torch.randn(2 * tokens, 128, generator=generator)
    x = original + original @ change + noise * torch.randn(2 * tokens, 128, generator=generator)
    read = Input(["m"], 128, [weight])
    for batch, (rows, others) in enumerate(zip(x[:tokens].chunk(4), original[:tokens].chunk(4), strict=True)):
        if batch == 2:
            read.half()
        read.add(rows, others)
    read.finish()
    order = torch.arange(128)
    aim = read.aim("m", weight, inverse_factor(read.hessian), order)

    def lost(matrix: torch.Tensor) -> float:
        return float((x[tokens:] @ matrix.T - original[tokens:] @ weight.T).square().sum())

    assert least <= read.share <= most and lost(aim) <= lost(weight)


@pytest.mark.parametrize("width", [24, 1000])
def test_half_of_a_hessian_is_computed_and_all_of_it_read(width: int) -> None:
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.zeros(width, width)
    for part in rows.float().chunk(2):
        inputs.add_gram(gram, part)
    inputs.mirror(gram)
    torch.testing.assert_close(gram, (rows.T @ rows).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(gram, gram.T)


def test_what_few_outputs_lack_is_gathered_instead_of_what_their_inputs_lack() -> None:
    """Which takes less, and moves each matrix as far: two of 12 outputs read 64 inputs, or with a third of 64."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (12, 12, 64)]
    original = torch.randn(1024, 64, generator=generator)
    x = original + original @ torch.randn(64, 64, generator=generator) / 32
    order, aims, shapes = torch.randperm(64, generator=generator), [], []
    for names in (["a", "b"], ["a", "b", "c"]):
        read = Input(names, 64, weights[: len(names)])
        for batch, (rows, others) in enumerate(zip(x.chunk(4), original.bfloat16().chunk(4), strict=True)):
            if batch == 2:
                read.half()
            read.add(rows, others)
        read.finish()
        assert read._lacking is not None
        shapes.append(tuple(read._lacking.shape))
        read.share = 0.5  # theirs are of other matrices, too
        factor = inverse_factor(read.hessian[order][:, order])
        aims.append([read.aim(name, weight, factor, order) for name, weight in zip("ab", weights, strict=False)])
    assert shapes == [(24, 64), (64, 64)]
    for projected, whole, weight in zip(*aims, weights, strict=False):
        torch.testing.assert_close(projected, whole, rtol=1e-3, atol=1e-3)
        assert float((whole - weight).norm()) > 0.05 * float(weight.norm())


def test_no_matrix_is_moved_far() -> None:
    """What moves it further than a quarter of its norm is chance, or a fault."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32), torch.randn(512, 32)
    read = Input(["m"], 32, [weight])
    for rows in x.chunk(2):
        read.add(rows, (3 * rows).bfloat16())
        if not read._steps:
            read.half()
    read.finish()
    move = read.aim("m", weight, inverse_factor(read.hessian), torch.arange(32)) - weight
    assert read.share > 0.9 and float(move.norm()) == pytest.approx(0.25 * float(weight.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "half"), [([640, 640], 1), ([100] * 8, 4), ([1007, 17], None), ([1024], None), ([900, 255], None), ([900, 256], 1)]
)
def test_few_tokens_judge_nothing(sizes: list[int], half: int | None) -> None:
    """Half of the tokens judge the other half, not half of the batches; where they are few, no matrix is moved."""
    of_sizes = _OneBlock(torch.nn.Identity(), [])
    of_sizes.sizes = sizes
    assert inputs._half(of_sizes) == half  # type: ignore[arg-type]


def test_a_matrix_whose_input_lacks_nothing_stays() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 32), torch.randn(64, 32)
    read = Input(["m"], 32, [weight])
    for rows in x.chunk(2):
        read.half()
        read.add(rows, rows.bfloat16())
    read.finish()
    assert torch.equal(read.aim("m", weight, inverse_factor(read.hessian), torch.arange(32)), weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_of_equal_weights(symmetric: bool) -> None:
    """Zeros stay zero, and a group of them has a scale."""
    weight, hessian = problem()
    weight[:, 64:128], weight[3] = 0, 0
    linear = solved(weight, hessian, 4, 64, symmetric)
    assert not linear.dequantized()[3].any() and (linear.scales > 0).all()


WORDS = """
import sys
import numpy as np, torch
from gptqmodel import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

arrays = np.load(sys.argv[1])
weight, inputs = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["inputs"])
module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
module.weight.data = weight.clone()
config = QuantizeConfig(bits=4, group_size=128, sym=False, desc_act=False, act_group_aware=False, damp_percent=float(sys.argv[3]))
task = GPTQ(module, config)
task.quantizer.configure(perchannel=True)
task.add_batch(inputs[None], None)
np.save(sys.argv[2], task.quantize()[0].float().numpy())
"""


@pytest.mark.families
def test_the_codes_of_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whole ranges and its damping, groups as long as its blocks, scales of four bytes: the same weights, but for ties."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 256, generator=generator) @ (torch.randn(256, 256, generator=generator) / 16 + torch.eye(256))
    weight = torch.randn(64, 256, generator=generator)
    np.savez(tmp_path / "given.npz", weight=weight.numpy(), inputs=inputs.numpy())
    monkeypatch.setattr(gptq, "SHARES", (1.0,))
    monkeypatch.setattr(gptq, "in_half", lambda scales, **_: scales)
    command = [sys.executable, "-c", WORDS, tmp_path / "given.npz", tmp_path / "theirs.npy", str(gptq.DAMPING)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=HUNG, cwd=tmp_path)
    theirs = np.load(tmp_path / "theirs.npy")
    ours = gptq.quantized("m", weight, gptq.inverse_factor(inputs.T @ inputs), torch.arange(256), 4, 128).dequantized()
    assert np.mean(np.isclose(ours, theirs, atol=1e-4)) > 0.995


# --- the stage


def job_in(folder: Path, source: Path, text: Path, tokens: int = 1024, **options: Any) -> QuantizeJob:
    """A job on a text of its own, that works in ``folder``."""
    rows = text_windows(text, source, budget=tokens, length=WINDOW, shortest=16)
    job = job_of(source, lambda: rows, **{"method": "gptq", "group_size": 32, "calibration": text, **options})
    return dataclasses.replace(job, scratch=folder / "scratch")


def made(source: Path, out: Path, text: Path, **options: Any) -> tuple[Artifact, dict[str, PackedLinear]]:
    """The stage's folder, and the matrices of its blocks."""
    settings = QuantizeOptions(method="gptq", calibration=text, **{"calibration_tokens": 1024, "group_size": 32, **options})
    packed = run("quantize", Artifact.load(source), out, settings)
    file = PackedFile(out)
    return packed, {name: file[name] for name in file if ".layers." in name or ".h." in name}


def test_each_matrix_reads_what_those_before_it_make(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes are those of hooks on the whole model, whose matrices are quantized one after another as they run.

    Each is moved towards what would make up for what its input has lost, as far as half of the tokens confirm what the others say.
    """
    shares: list[float] = []
    monkeypatch.setattr(inputs, "LONGEST", float("inf"))  # a test of its own
    monkeypatch.setattr("edgepress.pipeline.checkpoint.stream.prefers_bfloat16", lambda: False)
    monkeypatch.setattr(stream, "TOKENS", 128)
    job = job_in(tmp_path, tiny, text)
    rows, found = job.windows(), gptq.quantize(job)
    sizes = Stream(job.checkpoint, rows).sizes
    half = next(end for end in accumulate(sizes) if 2 * end >= sum(sizes))
    models = load_model(tiny), load_model(tiny)
    linears = block_linears(models[0])
    for names in _in_order(list(linears)):
        x, original = (_entering(model, names[0], rows) for model in models)
        assert len(x) == sum(map(len, rows)) > half
        weights = [linears[name].weight.detach() for name in names]
        (seen, other), (seen_original, other_original) = x.split([half, len(x) - half]), original.split([half, len(x) - half])
        steps = [_towards(weight, seen, seen_original) for weight in weights]
        lacks = [_lacks(other, other_original) @ weight.T for weight in weights]
        won = sum(float((other @ step.T * lacked).sum()) for step, lacked in zip(steps, lacks, strict=True))
        made = sum(float((other @ step.T).square().sum()) for step in steps)
        share = min(1.0, max(0.0, won / made)) if made else 0.0
        shares.append(share)
        for name, weight in zip(names, weights, strict=True):
            expected = solved(weight + share * _towards(weight, x, original), x.T @ x, 4, 32)
            same = np.mean(expected.unpacked() == found[name].unpacked())
            assert same > 0.97, (name, same)  # sums in another order tip a code now and then, and later ones with it
            with torch.no_grad():
                linears[name].weight.copy_(torch.from_numpy(found[name].dequantized()))
    assert shares[0] == 0 and sum(share > 0 for share in shares) > 8, "nothing is lost before the first matrix"


def test_no_token_counts_for_all_others() -> None:
    """One that enters with thirty times the norm counts as one with three times; a batch of nothing but zeros is none."""
    generator = torch.Generator().manual_seed(0)
    rows, lacking = torch.randn(65, 16, generator=generator), torch.randn(65, 16, generator=generator).bfloat16().float()
    rows = rows / rows.norm(dim=1, keepdim=True)
    original = rows.bfloat16().float() + lacking / 8
    shorter, longer = rows.clone(), rows.clone()
    longer[7] *= 30
    lack = original - shorter.bfloat16().float()
    taken, wanted = (inputs.Input(["m"], 16, [torch.eye(16)]) for _ in range(2))
    taken.add(longer, longer.bfloat16().float() + lack)
    shorter[7] *= 3
    lack[7] /= 10
    torch.testing.assert_close(taken.hessian, shorter.T @ shorter, rtol=1e-4, atol=1e-4)
    assert taken._lacking is not None
    torch.testing.assert_close(taken._lacking, lack.T @ shorter, rtol=0.02, atol=0.02)  # bfloat16
    wanted.add(torch.zeros(4, 16), torch.zeros(4, 16))
    assert not wanted.hessian.any()


def _lacks(x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return original.bfloat16().float() - x.bfloat16().float()  # as it is kept


def _entering(model: torch.nn.Module, name: str, rows: list[np.ndarray]) -> torch.Tensor:
    """What enters a module, (tokens, in)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.from_numpy(row)[None], use_cache=False)
    handle.remove()
    return torch.cat(seen)


def _towards(weight: torch.Tensor, x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Least squares, in float64: the step of a weight that makes of x what it made of the original, damped as GPTQ is."""
    hessian = (x.T @ x).double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return torch.linalg.solve(hessian, x.T.double() @ (_lacks(x, original) @ weight.T).double()).T.float()


def _in_order(names: list[str]) -> Iterator[list[str]]:
    for layer in range(4):
        of = [name for name in names if f".layers.{layer}." in name]
        for kinds in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            yield [name for name in of if name.endswith(kinds)]


def test_what_a_quantized_matrix_makes_is_computed_once(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as there is room for it, and the codes are the same without."""
    monkeypatch.setattr(stream, "TOKENS", 128)
    job, forward, calls = job_in(tmp_path, tiny, text), torch.nn.Linear.forward, Counter[torch.nn.Module]()
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (calls.update([self]), forward(self, x))[1])
    monkeypatch.setattr(inputs, "_PRODUCTS", (torch.nn.Linear.forward,))
    monkeypatch.setattr(forwards, "_product", lambda module, x: type(module).forward(module, x))
    batches = len(Stream(job.checkpoint, job.windows()).sizes)
    found, total, most = list[dict[str, PackedLinear]](), list[int](), list[int]()
    for room in (settled.KEPT, 300_000, 0):
        monkeypatch.setattr(settled, "KEPT", room)
        calls.clear()
        found.append(gptq.quantize(job))
        total.append(calls.total())
        # in the original, to see the order; and then once, or for o, for gate and up, for down, and to go on
        most.append(max(calls.values()) - 2)  # the other one is to see what a block hands on
        gptq.remove(job.scratch)
    assert batches > 2 and total[0] < total[1] < total[2]
    assert most[0] == 2 * batches and most[2] == 5 * batches
    for name, linear in found[0].items():
        for other in found[1:]:
            assert all(np.array_equal(getattr(other[name], part), getattr(linear, part)) for part in ("codes", "scales", "zeros"))


def test_interrupted_it_goes_on_with_the_same_codes(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one block is lost, whatever the bits of single matrices."""
    monkeypatch.setattr(stream, "TOKENS", 128)  # so that matrices are moved, by what is kept of the original
    job = job_in(tmp_path, tiny, text)
    job.exceptions["model.layers.0.mlp.up_proj"] = (8, 16)
    whole = gptq.quantize(job)
    worked: list[int] = []
    of_block = gptq._of_block

    def counted(job: Any, stream: Stream, block: torch.nn.Module, settle: Callable) -> Iterator[PackedLinear]:
        worked.append(stream.done)
        if len(worked) == 3:
            raise KeyboardInterrupt
        return of_block(job, stream, block, settle)

    monkeypatch.setattr(gptq, "_of_block", counted)
    gptq.remove(job.scratch)
    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(job)
    assert (job.scratch / gptq.STATES).is_file()
    again = gptq.quantize(job)
    assert worked == [0, 1, 2, 2, 3]
    assert again.keys() == whole.keys() and again["model.layers.0.mlp.up_proj"].bits == 8
    for name, linear in whole.items():
        assert all(np.array_equal(getattr(again[name], part), getattr(linear, part)) for part in ("codes", "scales", "zeros")), name


@pytest.mark.parametrize("kind", [dict, UserDict])  # transformers has both
def test_blocks_that_share_more_than_states_are_not_gone_on_with(
    kind: type, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n hands keys and values on in a dictionary, which no file holds: the work begins anew, and why is known.

    Nor does the original run, which would read what the quantized blocks handed on.
    """
    call = LlamaDecoderLayer.__call__
    told: list[Begun] = []
    handed = {"shared_kv_states": kind()}
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, *args, **kw: call(self, *args, **kw | handed))
    monkeypatch.setattr(Stream, "advance_original", None)
    monkeypatch.setattr(gptq, "report_begun", told.append)
    monkeypatch.setattr(stream, "TOKENS", 128)
    job = job_in(tmp_path, tiny, text)
    assert len(gptq.quantize(job)) == 28
    assert not (job.scratch / gptq.STATES).exists() and "share keys and values" in told[0].lost_because


@pytest.mark.parametrize("file", ["states.safetensors", "block-000/packed.safetensors", "block-002/packed.safetensors"])
def test_what_is_damaged_is_not_taken(file: str, tiny: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut off by a power failure: the work starts over, and says why."""
    job = job_in(tmp_path, tiny, text, 256)
    whole = gptq.quantize(job)
    damaged = job.scratch / file
    damaged.write_bytes(damaged.read_bytes()[:1000])
    caplog.set_level("INFO", "edgepress")
    again = gptq.quantize(job)
    assert "GPTQ starts over" in caplog.text
    assert all(np.array_equal(again[name].codes, linear.codes) for name, linear in whole.items())


@pytest.mark.parametrize("changed", ["config.json", "model.safetensors"])
def test_work_on_another_model_is_not_taken(
    changed: str, tiny: Path, text: Path, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    """Its folder has the same name, its matrices the same shapes."""
    source = copy_of(tiny)
    job = job_in(tmp_path, source, text, 256)
    first = gptq.quantize(job)
    if changed == "config.json":
        config = json.loads((source / changed).read_text())
        (source / changed).write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}))
    else:
        tensors = load_file(source / changed)
        tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.5
        save_file(tensors, source / changed, {"format": "pt"})
    job = dataclasses.replace(job_in(tmp_path, source, text, 256), scratch=job.scratch)
    again = gptq.quantize(job)
    name = "model.layers.1.mlp.down_proj"
    assert not np.array_equal(first[name].codes, again[name].codes)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"\xff"], ids=range(4))
def test_what_another_job_left_is_not_taken(broken: bytes, tiny: Path, text: Path, tmp_path: Path) -> None:
    job = job_in(tmp_path, tiny, text, 256)
    job.scratch.mkdir()
    (job.scratch / gptq.STATES).write_bytes(b"states of something else")
    (job.scratch / JOB).write_bytes(broken)
    assert len(gptq.quantize(job)) == 28


@pytest.mark.usefixtures("isolation")
def test_the_stage(tiny: Path, text: Path, tmp_path: Path) -> None:
    """What it records, and that nothing is left beside the folder."""
    packed, linears = made(tiny, tmp_path / "out", text)
    assert len(linears) == 28 and [p.name for p in tmp_path.iterdir()] == ["out"]
    facts = packed.steps[-1].facts
    rows = text_windows(text, tiny, budget=1024, length=WINDOW, shortest=16)
    assert facts["calibration_positions"] == sum(map(len, rows)) and facts["bits"] == {"4": 28}
    assert facts["calibration"]["text"] == text.name and facts["calibration"]["windows"] == len(rows)
    assert {len(row) for row in rows[:-1]} == {64}  # the first token of a text must count: see plan.WINDOW
    assert max(facts["relative_error"].values()) < 0.2


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_few_bits_reads_what_leaves_the_blocks(
    tied: bool, random_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Its codes are those of the Hessian of what enters the head of the quantized model; at 8 bits it is rounded."""
    source = random_model(LlamaConfig(**TINY, tie_word_embeddings=tied), tmp_path / "model")
    made(source, tmp_path / "out", text, head_bits=4)
    model, inputs = load_model(tmp_path / "out"), list[torch.Tensor]()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    rows = text_windows(text, source, budget=1024, length=WINDOW, shortest=16)
    with torch.inference_mode():
        whole = load_model(source).get_input_embeddings().weight
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(whole))  # rounded since: the stream began with the source's
        for row in rows:
            model(input_ids=torch.from_numpy(row)[None], use_cache=False)
    x = torch.cat(inputs)
    name = "model.embed_tokens" if tied else "lm_head"
    weight = load_file(source / "model.safetensors")[f"{name}.weight"]
    found = PackedFile(tmp_path / "out")[name]
    assert np.mean(solved(weight, x.T @ x, 4, 32).unpacked() == found.unpacked()) > 0.97
    rounded = round_to_nearest(name, weight.numpy(), 4, 32, False)
    assert lost(found, weight, x.T @ x) < 0.7 * lost(rounded, weight, x.T @ x)
    made(source, tmp_path / "eight", text)
    assert np.array_equal(PackedFile(tmp_path / "eight")[name].codes, round_to_nearest(name, weight.numpy(), 8, 32, True).codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_are_always_zero(act_order: bool, tiny: Path, text: Path, tmp_path: Path, copy_of: Callable[..., Path]) -> None:
    """Their columns are rounded, for another text may need them and the proof would miss them."""
    source = copy_of(tiny)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][5:12] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    name = "model.layers.1.self_attn.q_proj"
    _, linears = made(source, tmp_path / "out", text, bits=8, act_order=act_order, calibration_tokens=256)
    off = linears[name].dequantized() - tensors[f"{name}.weight"].numpy()
    assert np.isfinite(off).all() and np.abs(off[:, 5:12]).max() < 0.01


@pytest.mark.parametrize("wrong", ["model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_codes_that_restore_something_else_are_caught(
    wrong: str, random_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero points off by one, in a matrix or in the head, which is the embedding."""

    def spoilt(name: str, *rest: Any, **others: Any) -> PackedLinear:
        linear = right(name, *rest, **others)
        assert linear.zeros is not None
        zeros = np.minimum(linear.zeros + 1, 15).astype(np.uint8)
        return dataclasses.replace(linear, zeros=zeros) if name == wrong else linear

    source = random_model(LlamaConfig(**TINY, tie_word_embeddings=True), tmp_path / "model")
    job = dataclasses.replace(job_in(tmp_path, source, text, 256), head=("model.embed_tokens", 4, 32))
    right = gptq.quantized
    monkeypatch.setattr(gptq, "quantized", spoilt)
    with pytest.raises(ProofError, match=f"{wrong} was quantized with an error"):
        gptq.quantize(job)


def test_a_head_of_nothing() -> None:
    """A final norm of zeros makes a Hessian of zeros; damping grows from the mean of its diagonal."""
    assert bool(torch.isfinite(gptq.inverse_factor(torch.zeros(8, 8))).all())


def test_act_order_and_bits_by_module(tiny: Path, text: Path, tmp_path: Path) -> None:
    rules = ("model.layers.0.mlp.*=8", "model.layers.1.*=16")
    packed, linears = made(tiny, tmp_path / "out", text, act_order=True, bits_for=rules)
    assert {name for name, linear in linears.items() if linear.bits == 8} == {
        f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert len(linears) == 21 and not [name for name in linears if ".layers.1." in name]
    assert all(linear.permutation is not None for linear in linears.values())
    q, k, v = (linears[f"model.layers.2.self_attn.{x}_proj"].permutation for x in "qkv")
    assert np.array_equal(q, k) and np.array_equal(q, v)  # one input, one Hessian, one order: one operator in ONNX
    assert max(packed.steps[-1].facts["relative_error"].values()) < 0.2


def test_matrices_stored_the_other_way_round(random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    config = GPT2Config(vocab_size=5120, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    packed, linears = made(random_model(config, tmp_path / "model"), tmp_path / "out", text)
    assert linears["transformer.h.0.mlp.c_fc"].shape == (256, 64) and len(linears) == 8
    assert max(packed.steps[-1].facts["relative_error"].values()) < 0.2


def test_files_with_other_names_than_the_modules(random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Experts are one tensor in memory and many in the files, so the model is read whole; its attention is quantized."""
    packed, linears = made(random_model(family_config("mixtral"), tmp_path / "model"), tmp_path / "out", text)
    assert len(linears) == 28 and max(packed.steps[-1].facts["relative_error"].values()) < 0.2


class _Experts(torch.nn.Module):
    """Three experts: a token goes to one of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, first = x.reshape(-1, 32), x.reshape(-1, 32)[:, 0] > 0
        out = torch.empty_like(flat)
        out[first], out[~first] = self.experts[0](flat[first]), self.experts[1](flat[~first])
        return out.view_as(x)


class _OneBlock:
    """A stream of two batches through one block."""

    name, done, resumable = "layers", 0, True

    def __init__(self, block: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
        self._block, self._inputs, self.sizes = block, inputs, [640, 640]

    def advance_original(self) -> Iterator[None]:
        for x in self._inputs:
            self._block(-x)  # other tokens for each expert
            yield

    def run(self, last: torch.nn.Module | None = None) -> Iterator[None]:
        assert last is None  # which expert runs last is not known
        for x in self._inputs:
            self._block(x)
            yield


def never(module: torch.nn.Module) -> None:
    """Of numbered parts it is not known whether one that is quantized reads what another makes, which is not quantized yet."""
    raise AssertionError


def test_numbered_parts_may_read_one_another(tiny: Path) -> None:
    """Those of a Sequential are told apart by numbers alone, as experts are, but the second reads what the first makes."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False), torch.nn.ReLU(), torch.nn.Linear(64, 32, bias=False))
    x, weight = [torch.randn(2, 320, 32), torch.randn(2, 320, 32)], block[2].weight.detach().clone()
    job = job_of(tiny, method="gptq", group_size=32)
    job.linears.clear()
    job.linears.update({"layers.0.0": (64, 32), "layers.0.2": (32, 64)})
    with torch.no_grad():
        rows = block[:2](torch.cat(x)).reshape(-1, 64)
        found = {one.name: one for one in gptq._of_block(job, _OneBlock(block, x), block, never)}  # type: ignore[arg-type]
    assert np.mean(solved(weight, rows.T @ rows, 4, 32).unpacked() == found["layers.0.2"].unpacked()) > 0.99


@pytest.mark.families
@pytest.mark.parametrize("family", ["llama4_text", "falcon", "gpt_neox", "mixtral"])
def test_what_is_kept_changes_nothing(
    family: str, random_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers that are a Linear and give more than its product, and models that write into what a matrix gave them."""
    job = job_in(tmp_path, random_model(family_config(family), tmp_path / "model"), text)
    kept = gptq.quantize(job)
    gptq.remove(job.scratch)
    monkeypatch.setattr(settled, "KEPT", 0)
    monkeypatch.setattr(inputs, "_nothing", None)
    monkeypatch.setattr(inputs, "_PRODUCTS", ())  # so that everything is computed
    for name, linear in gptq.quantize(job).items():
        assert np.array_equal(kept[name].codes, linear.codes) and np.array_equal(kept[name].scales, linear.scales), name


def test_what_a_block_writes_into_is_a_copy(tiny: Path) -> None:
    """What a matrix made once is given to every pass as it was."""
    block = torch.nn.Linear(8, 8, bias=False)
    running = SimpleNamespace(runs=0, batch=0)
    x = torch.randn(3, 8)
    with torch.inference_mode(), settled.settled(running) as settle:  # type: ignore[arg-type]
        with forwards.by_onednn([block]):  # as a stream does
            expected = block(x)
        settle(block)
        for running.runs in range(1, 4):
            found = block(x)
            assert torch.equal(found, expected)
            found.mul_(2)
    assert torch.equal(block(x), torch.nn.functional.linear(x, block.weight)) and "forward" not in vars(block)


def test_experts_get_their_own_tokens(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All experts in one pass, each with the Hessian of the tokens that reach it; one that none reaches is rounded, and said.

    The original gives them other tokens, which are of no account.
    """
    torch.manual_seed(0)
    block, batches = _Experts(), [torch.randn(2, 40, 32), torch.randn(2, 40, 32)]
    weights = [expert.weight.detach().clone() for expert in block.experts]
    names = [f"layers.0.experts.{index}" for index in range(3)]
    job = job_of(tiny, method="gptq", group_size=32)
    job.linears.clear()
    job.linears.update(dict.fromkeys(names, (32, 32)))
    caplog.set_level("INFO", "edgepress")
    with torch.no_grad():
        found = {linear.name: linear for linear in gptq._of_block(job, _OneBlock(block, batches), block, lambda _: None)}  # type: ignore[arg-type]
    x = torch.cat(batches).reshape(-1, 32)
    for index, rows in enumerate((x[x[:, 0] > 0], x[x[:, 0] <= 0])):
        expected = solved(weights[index], rows.T @ rows, 4, 32)
        assert np.mean(expected.unpacked() == found[names[index]].unpacked()) > 0.99
    expected = round_to_nearest("m", weights[2].numpy(), 4, 32, False)
    assert np.array_equal(expected.codes, found[names[2]].codes) and f"enter {names[2]} and 0 more" in caplog.text


@pytest.mark.families
def test_a_trained_model_keeps_more(tmp_path: Path, shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """Perplexity of babyllama-361 on text after its calibration text, 3 bits so that the difference is far above noise."""
    folder = shared_model("babyllama-361")
    _, linears = made(folder, tmp_path / "out", tinystories, bits=3, calibration_tokens=16384)
    trained = Trained(folder, text_windows(tinystories, folder, budget=16000, skip=16384))
    whole, ours = trained.perplexity(), trained.perplexity(linears)
    assert whole < ours < trained.perplexity(trained.rounded(3, 32))
    assert matrices(folder).keys() == linears.keys()


def test_a_finished_job_is_not_done_again(tiny: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What failed after it, a full disk say, costs no second run; and a line says so. Another text is another job."""
    job = job_in(tmp_path, tiny, text, 256)
    caplog.set_level("INFO", "edgepress")
    gptq.quantize(job)
    assert not caplog.messages
    gptq.quantize(job)
    assert caplog.messages == ["quantize: GPTQ goes on after block 4 of 4, where it was interrupted"]
    gptq.quantize(dataclasses.replace(job_in(tmp_path, tiny, text, 512), scratch=job.scratch))
    assert len(caplog.messages) == 1
