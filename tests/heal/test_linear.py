"""Healing in closed form equals its explicit map, and is refused where no matrix can take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks, block_output
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.least_squares import last_matrix
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json, sha256
from edgepress.pipeline.heal import linear
from edgepress.pipeline.heal.job import Gap, HealJob
from edgepress.pipeline.heal.teacher import record
from edgepress.pipeline.options import HealOptions, PruneOptions
from edgepress.pipeline.text.windows import text_windows
from families import family_config
from transformers import AutoModelForCausalLM


@contextmanager
def added_map(block: torch.nn.Module, matrix: torch.nn.Module, change: torch.Tensor) -> Iterator[None]:
    """The map is added to the block's output, applied to what enters the matrix, instead of folded into the matrix."""
    seen: list[torch.Tensor] = []
    first = matrix.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    second = block.register_forward_hook(lambda _, args, output: block_output(output) + seen.pop() @ change)
    yield
    first.remove()
    second.remove()


@pytest.mark.families
def test_linear_helps_and_equals_the_explicit_map(
    pruned: Artifact, reference: Path, tmp_path: Path, options: Callable[..., HealOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain transformers loads a checkpoint of the same architecture; its logits are those with the map outside the matrix."""
    monkeypatch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 3000)
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, calibration_tokens=4500))
    facts = healed.steps[-1].facts
    assert facts["accepted"] and facts["held_out_perplexity"][1] < facts["held_out_perplexity"][0]
    assert read_json(healed.path / "config.json") == read_json(pruned.path / "config.json")
    before, after = (AutoModelForCausalLM.from_pretrained(a.path, dtype=torch.float32).eval() for a in (pruned, healed))
    changed = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    blocks = {"model.layers.3.mlp.down_proj.weight": 3, "model.layers.6.mlp.down_proj.weight": 6}
    assert changed and set(changed) <= set(blocks)  # where no ridge helps, a matrix stays
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())
    ids = torch.from_numpy(text_windows(reference / "evaluation.txt", reference, budget=100, length=100)[0])[None]
    with torch.inference_mode():
        folded = after(ids).logits
        with ExitStack() as maps:
            for name in changed:
                block = before.model.layers[blocks[name]]
                change = after.get_parameter(name) - before.get_parameter(name)
                maps.enter_context(added_map(block, block.mlp.down_proj, change.T))
            explicit = before(ids).logits
    assert float((folded - explicit).abs().max()) < 1e-4


def test_statistics_are_those_of_least_squares(
    pruned: Artifact, reference: Path, tmp_path: Path, options: Callable[..., HealOptions]
) -> None:
    """One gap against numpy's lstsq on every token at once, with the ridge as added rows."""
    windows = text_windows(CALIBRATION_TEXT, reference, budget=900, length=150)
    teacher = record(Checkpoint(reference), windows, [6, 16], tmp_path)
    blocks = Blocks(load_model(pruned.path))
    job = HealJob(blocks, [Gap(3, 6)], windows, teacher, [windows], options(reference), tmp_path)
    target = last_matrix(blocks, 3, torch.from_numpy(windows[0])[None, :32])
    matrix = target.matrix
    assert (target.name, target.factor) == ("model.layers.3.mlp.down_proj", pytest.approx(1, abs=1e-4))
    sums = linear._statistics(job, Gap(3, 6), matrix)
    solution = sums.solved(0.1).numpy()

    entering, leaving = [], []
    handle = matrix.register_forward_hook(lambda _, args, output: entering.append(args[0][0].double().numpy()))
    for row in windows:
        leaving.append(blocks.states(torch.from_numpy(row)[None], [4])[4][0].double().numpy())
    handle.remove()
    states = np.array(teacher[6], dtype=np.float64)
    weights = 1 / np.linalg.norm(states, axis=1, keepdims=True)
    x, y = np.concatenate(entering) * weights, (states - np.concatenate(leaving)) * weights
    ridge = 0.1 * np.diag(x.T @ x).mean()
    rows = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])]), np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
    naive = np.linalg.lstsq(*rows, rcond=None)[0]
    assert np.abs(solution - naive).max() < 1e-3 * np.abs(naive).max()


HEALS = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi",
    "phi3",
    "smollm3",
    "granite",
    "gpt2",
    "opt",
    "gpt_neox",
    "bloom",
    "falcon",
    "llama4_text",
    "qwen3_moe",
}


@pytest.mark.parametrize("name", sorted(HEALS | {"gemma2", "gemma3_text", "olmo2", "mixtral", "gpt_oss"}))
def test_the_matrix_is_found_by_what_it_does(
    name: str, text: Path, tmp_path: Path, random_model: Callable[..., Path], options: Callable[..., HealOptions]
) -> None:
    """In every family the change solved for brings the stream nearer; where a norm or experts are between, it is refused."""
    folder = random_model(family_config(name), tmp_path / name)
    windows = text_windows(text, folder, budget=1200, length=100)
    teacher = record(Checkpoint(folder), windows, [4, 7], tmp_path)
    blocks = Blocks(load_model(folder))
    with blocks.without([3]):
        if name not in HEALS:
            with pytest.raises(ModelError, match="no single matrix"):
                last_matrix(blocks, 2, torch.from_numpy(windows[0])[None, :32])
            return
        job = HealJob(blocks, [Gap(2, 4)], windows, teacher, [windows[:2]], options(folder), tmp_path)
        target = last_matrix(blocks, 2, torch.from_numpy(windows[0])[None, :32])
        matrix = target.matrix
        sums = linear._statistics(job, Gap(2, 4), matrix)

        def distance() -> float:
            states = [blocks.states(torch.from_numpy(row)[None], [3])[3][0] for row in windows]
            original = torch.from_numpy(np.array(teacher[4]))
            return float(((torch.cat(states) - original).norm(dim=-1) / original.norm(dim=-1)).square().mean())

        before = distance()
        linear._set(matrix, matrix.weight.detach().clone(), linear._bias(matrix), sums.solved(1e-3) / target.factor)
        assert distance() < 0.97 * before, target.name


@pytest.mark.parametrize(("family", "scale"), [("llama", 1.0), ("gemma", 1.0), ("granite", 3.0)])
def test_a_gap_at_the_beginning_goes_into_an_untied_embedding(
    family: str, scale: float, text: Path, tmp_path: Path, random_model: Callable[..., Path], options: Callable[..., HealOptions]
) -> None:
    """No block is before it. Gemma's table scales its output, Granite's model does so after it: only that is divided out."""
    config = family_config(family)
    config.tie_word_embeddings = False
    folder = random_model(config, tmp_path / "model")
    windows = text_windows(text, folder, budget=2000, length=200)
    blocks = Blocks(load_model(folder))
    target = linear._embedding(blocks, windows[0])
    table, factor = target.matrix, target.factor
    assert factor == pytest.approx(scale)
    teacher = record(Checkpoint(folder), windows, [1, 7], tmp_path)
    with blocks.without([0]):
        job = HealJob(blocks, [Gap(-1, 1)], windows, teacher, [windows[:2]], options(folder), tmp_path)
        sums = linear._statistics(job, Gap(-1, 1), table)
        original = torch.from_numpy(np.array(teacher[1]))

        def distance() -> float:
            states = torch.cat([blocks.states(torch.from_numpy(row)[None], [1])[1][0] for row in windows])
            return float(((states - original).norm(dim=-1) / original.norm(dim=-1)).square().mean())

        distances = [distance()]
        weight, change = table.weight.detach().clone(), sums.solved(1e-3)
        for divisor in (factor, 1.2 * factor, factor / 1.2):
            linear._set(table, weight, None, change / divisor)
            distances.append(distance())
    assert distances[1] == min(distances)  # the exact factor is the best one


@pytest.mark.usefixtures("short_other_text")
def test_a_tied_embedding_is_refused(
    reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: Callable[..., HealOptions]
) -> None:
    folder = tmp_path / "pruned"
    pruned = stages.run("prune", Artifact.load(reference), folder, PruneOptions(remove_layers=(0,), calibration_tokens=500))
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, calibration_tokens=1000))
    (method,) = healed.steps[-1].facts["methods"]
    assert not method["accepted"] and "tied to the head" in method["before layer 1"]["not_healed"]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")
    assert any("--healer lora may" in entry.message for entry in caplog.records)
