"""Healing: closed form equal to its explicit map, distillation that resumes, and a guard that refuses harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact, read_json, sha256
from edgepress.pipeline.blocks import Blocks, block_output
from edgepress.pipeline.checkpoint import load_model
from edgepress.pipeline.errors import ModelError, OptionError
from edgepress.pipeline.heal import Texts, heal_folder, kept_layers, record, split
from edgepress.pipeline.healers import Cut, Patient, cuts, linear
from edgepress.pipeline.healers.lora import contrast, sentences
from edgepress.pipeline.losses import mean_loss
from edgepress.pipeline.options import HealOptions, PruneOptions
from edgepress.pipeline.tokens import text_windows
from families import family_config
from transformers import AutoModelForCausalLM

REMOVED = (4, 5, 9)


@pytest.fixture(scope="module")
def pruned(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The reference model without a run of two layers and one more."""
    options = PruneOptions(layers=REMOVED, calibration=CALIBRATION_TEXT, calibration_tokens=1000)
    return stages.run("prune", Artifact.load(reference), tmp_path_factory.mktemp("heal") / "pruned", options)


def options(original: Path, **changes: Any) -> HealOptions:
    return HealOptions(**({"original": original, "calibration_tokens": 6000} | changes))


def test_gaps_are_seen_from_both_models() -> None:
    """Each gap: the block that stands before it now, and the old block whose input it must give."""
    assert cuts([0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15], 16) == [Cut(3, 6), Cut(6, 10)]
    assert cuts([2, 3], 6) == [Cut(-1, 2), Cut(1, 6)]
    assert cuts([0, 1], 2) == []


def test_layers_removed_twice_are_counted_in_the_original(pruned: Artifact, tmp_path: Path) -> None:
    again = stages.run("prune", pruned, tmp_path / "again", PruneOptions(layers=(0, 4), calibration_tokens=500))
    assert kept_layers(again) == ([1, 2, 3, 7, 8, 10, 11, 12, 13, 14, 15], 16)


def test_the_five_sets_share_no_window(reference: Path) -> None:
    """What heals never judges."""
    texts = split(reference, options(reference))
    sets = [{row.tobytes() for row in getattr(texts, name)} for name in ("fit", "selection", "judging", "other_selection", "other")]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))


@contextmanager
def beside(block: torch.nn.Module, matrix: torch.nn.Module, change: torch.Tensor) -> Iterator[None]:
    """The map stands beside the matrix, on what enters it, instead of in it."""
    seen: list[torch.Tensor] = []
    first = matrix.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    second = block.register_forward_hook(lambda _, args, output: block_output(output) + seen.pop() @ change)
    yield
    first.remove()
    second.remove()


def test_linear_helps_and_equals_the_explicit_map(pruned: Artifact, reference: Path, tmp_path: Path) -> None:
    """Plain transformers loads a checkpoint of the same architecture; its logits are those of the map beside the matrix."""
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference))
    facts = healed.steps[-1].facts
    assert facts["accepted"] and facts["held_out_perplexity"][1] < facts["held_out_perplexity"][0]
    assert read_json(healed.path / "config.json") == read_json(pruned.path / "config.json")
    before, after = (AutoModelForCausalLM.from_pretrained(a.path, dtype=torch.float32).eval() for a in (pruned, healed))
    changed = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    places = {"model.layers.3.mlp.down_proj.weight": 3, "model.layers.6.mlp.down_proj.weight": 6}
    assert changed and set(changed) <= set(places)  # where no ridge helps, a matrix stays
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in before.parameters())
    ids = torch.from_numpy(text_windows(reference / "evaluation.txt", reference, budget=100, length=100)[0])[None]
    with torch.inference_mode():
        folded = after(ids).logits
        with ExitStack() as maps:
            for name in changed:
                block = before.model.layers[places[name]]
                change = after.get_parameter(name) - before.get_parameter(name)
                maps.enter_context(beside(block, block.mlp.down_proj, change.T))
            explicit = before(ids).logits
    assert float((folded - explicit).abs().max()) < 1e-4


def test_statistics_are_those_of_least_squares(pruned: Artifact, reference: Path, tmp_path: Path) -> None:
    """One gap against numpy's lstsq on every token at once, with the ridge as added rows."""
    windows = text_windows(CALIBRATION_TEXT, reference, budget=900, length=150)
    teacher = record(reference, windows, [6, 16], tmp_path, False)
    blocks = Blocks(load_model(pruned.path))
    patient = Patient(blocks, [Cut(3, 6)], windows, teacher, [windows], options(reference), tmp_path)
    name, matrix, factor = linear._last_matrix(blocks, 3, windows[0])
    assert (name, factor) == ("model.layers.3.mlp.down_proj", pytest.approx(1, abs=1e-4))
    gram, cross = linear._statistics(patient, Cut(3, 6), matrix)
    found = linear._solve(gram, cross, 0.1).numpy()

    entering, leaving = [], []
    handle = matrix.register_forward_hook(lambda _, args, output: entering.append(args[0][0].double().numpy()))
    for row in windows:
        leaving.append(blocks.states(torch.from_numpy(row)[None], [4])[4][0].double().numpy())
    handle.remove()
    wanted = np.array(teacher[6], dtype=np.float64)
    weights = 1 / np.linalg.norm(wanted, axis=1, keepdims=True)
    x, y = np.concatenate(entering) * weights, (wanted - np.concatenate(leaving)) * weights
    ridge = 0.1 * np.diag(x.T @ x).mean()
    rows = np.concatenate([x, np.sqrt(ridge) * np.eye(x.shape[1])]), np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
    naive = np.linalg.lstsq(*rows, rcond=None)[0]
    assert np.abs(found - naive).max() < 1e-3 * np.abs(naive).max()


def test_recorded_states_are_the_whole_models(reference: Path, tmp_path: Path) -> None:
    """Also after the last block and for windows of unequal length; the head on them gives the whole model's logits."""
    windows = [
        row[:n] for row, n in zip(text_windows(CALIBRATION_TEXT, reference, budget=300, length=100), (100, 40, 77), strict=False)
    ]
    found = record(reference, windows, [6, 16], tmp_path, False)
    blocks = Blocks(load_model(reference))
    row = 0
    for ids in windows:
        states = blocks.states(torch.from_numpy(ids)[None], [6, 16])
        for index in (6, 16):
            own = found[index][row : row + len(ids)]
            assert np.abs(own - states[index][0].numpy()).max() < 1e-4 * np.abs(own).max()
        with blocks.entering(16, torch.from_numpy(np.array(found[16][row : row + len(ids)]))[None]):
            logits = blocks.logits(torch.from_numpy(ids)[None])
        assert float((logits - blocks.logits(torch.from_numpy(ids)[None])).abs().max()) < 1e-3
        row += len(ids)


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
}


@pytest.mark.parametrize("name", sorted(HEALS | {"gemma2", "gemma3_text", "olmo2", "mixtral"}))
def test_the_matrix_is_found_by_what_it_does(name: str, text: Path, tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """In every family the change solved for brings the stream nearer; where a norm or experts stand between, it is refused."""
    folder = random_model(family_config(name), tmp_path / name)
    windows = text_windows(text, folder, budget=1200, length=100)
    teacher = record(folder, windows, [4, 7], tmp_path, False)
    blocks = Blocks(load_model(folder))
    with blocks.without([3]):
        if name not in HEALS:
            with pytest.raises(ModelError, match="no single matrix"):
                linear._last_matrix(blocks, 2, windows[0])
            return
        patient = Patient(blocks, [Cut(2, 4)], windows, teacher, [windows[:2]], options(folder), tmp_path)
        matrix_name, matrix, factor = linear._last_matrix(blocks, 2, windows[0])
        gram, cross = linear._statistics(patient, Cut(2, 4), matrix)
        bias = None if getattr(matrix, "bias", None) is None else matrix.bias.detach().clone()

        def gap() -> float:
            states = [blocks.states(torch.from_numpy(row)[None], [3])[3][0] for row in windows]
            wanted = torch.from_numpy(np.array(teacher[4]))
            return float(((torch.cat(states) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean())

        before = gap()
        linear._set(matrix, matrix.weight.detach().clone(), bias, linear._solve(gram, cross, 1e-3) / factor)
        assert gap() < 0.97 * before, matrix_name


def test_a_gap_at_the_beginning_goes_into_an_untied_embedding(tiny: Path, text: Path, tmp_path: Path) -> None:
    """No block stands before it; where head and embedding are one, it is refused and the reason given."""
    windows = text_windows(text, tiny, budget=2000, length=200)
    blocks = Blocks(load_model(tiny))
    name, table, factor = linear._embedding(blocks, windows[0])
    assert (name, factor) == ("model.embed_tokens", pytest.approx(1))
    teacher = record(tiny, windows, [1, 4], tmp_path, False)
    with blocks.without([0]):
        patient = Patient(blocks, [Cut(-1, 1)], windows, teacher, [windows[:2]], options(tiny), tmp_path)
        gram, cross = linear._statistics(patient, Cut(-1, 1), table)

        def gap() -> float:
            states = torch.cat([blocks.states(torch.from_numpy(row)[None], [1])[1][0] for row in windows])
            return float((states - torch.from_numpy(np.array(teacher[1]))).square().mean())

        before = gap()
        linear._set(table, table.weight.detach().clone(), None, linear._solve(gram, cross, 1e-3))
        assert gap() < before


def test_a_tied_embedding_is_refused(reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pruned"
    pruned = stages.run("prune", Artifact.load(reference), folder, PruneOptions(layers=(0,), calibration_tokens=500))
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, calibration_tokens=1000))
    (method,) = healed.steps[-1].facts["methods"]
    assert not method["accepted"] and "tied to the head" in method["before layer 1"]["not_healed"]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")
    assert any("--method lora can" in entry.message for entry in caplog.records)


def test_harm_is_refused(pruned: Artifact, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tiny foreign text teaches what does not hold elsewhere: the checkpoint stays bit for bit, and manifest and log say so."""
    foreign = tmp_path / "foreign.txt"
    foreign.write_text(" ".join(str(n * 7919 % 10007) for n in range(400)))
    changes = {"calibration": foreign, "calibration_tokens": 600, "method": "lora", "lora_tokens": 3000, "learning_rate": 0.05}
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    facts = healed.steps[-1].facts
    assert not facts["accepted"] and not facts["methods"][0]["accepted"]
    rejected = facts["methods"][0]
    assert rejected["rejected_other_perplexity"][1] > rejected["rejected_other_perplexity"][0]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")
    assert any("did not help both kinds of text" in record.message for record in caplog.records)


def test_a_stored_type_is_kept_and_judged(tmp_path: Path, reference: Path) -> None:
    """A bfloat16 checkpoint stays one, and what was judged is what its rounding left."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    source = tmp_path / "bf16"
    model.save_pretrained(source)
    (source / "tokenizer.json").write_bytes((reference / "tokenizer.json").read_bytes())
    pruned = stages.run("prune", Artifact.load(source), tmp_path / "pruned", PruneOptions(layers=REMOVED, calibration_tokens=1000))
    healed = stages.run("heal", pruned, tmp_path / "healed", options(source, calibration_tokens=4000))
    facts = healed.steps[-1].facts
    assert facts["accepted"]
    assert AutoModelForCausalLM.from_pretrained(healed.path).dtype == torch.bfloat16
    texts: Texts = split(source, options(source, calibration_tokens=4000))
    assert facts["held_out_perplexity"][1] == pytest.approx(np.exp(mean_loss(load_model(healed.path), texts.judging)), rel=1e-4)


def test_lora_helps_merges_and_goes_on(pruned: Artifact, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a checkpoint, the same call trains the steps that are left and ends where it would have."""
    from edgepress.pipeline.healers import lora

    changes = {"method": "lora", "lora_tokens": 12 * 128 * 2, "lora_rank": 4, "contrastive": 0.05, "calibration_tokens": 3000}
    seen: list[int] = []

    class Counting(lora._Bar):
        stop = 7

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(state.global_step)
            if len(seen) == Counting.stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(lora, "BATCH", 2)
    monkeypatch.setattr("edgepress.pipeline.prune.LONGEST_WINDOW", 128)
    monkeypatch.setattr(lora, "_Bar", Counting)
    with pytest.raises(KeyboardInterrupt):
        stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    assert not (tmp_path / "healed").exists()
    Counting.stop = -1
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    assert seen == [*range(1, 8), *range(7, 13)]
    facts = healed.steps[-1].facts
    assert facts["accepted"] and facts["methods"][0]["steps"] == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["healed"]
    assert sorted(p.name for p in healed.path.iterdir() if p.suffix == ".safetensors") == ["model.safetensors"]
    straight = stages.run("heal", pruned, tmp_path / "straight", options(reference, **changes))
    assert straight.steps[-1].facts["held_out_perplexity"] == pytest.approx(facts["held_out_perplexity"], rel=2e-3)


def test_contrast_pulls_and_pushes() -> None:
    """Least when each window is nearest itself; windows confused cost more."""
    own = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert float(contrast(own, [own, own])) < float(contrast(own, [own.roll(1, 0), own]))
    states = torch.arange(12.0).reshape(1, 3, 4)
    assert torch.equal(sentences(states, torch.tensor([[True, True, False]])), states[:, :2].mean(1))


def test_heal_needs_an_original_and_a_pruned_checkpoint(pruned: Artifact, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give --original"):
        stages.run("heal", pruned, tmp_path / "out", HealOptions())
    with pytest.raises(ModelError, match="give a folder that edgepress prune wrote"):
        stages.run("heal", Artifact.load(reference), tmp_path / "out", options(reference))


def test_nothing_removed_nothing_healed(reference: Path, tmp_path: Path) -> None:
    facts = heal_folder(tmp_path, reference, list(range(16)), 16, options(reference))
    assert not facts["accepted"] and facts["why"] == "no layer was removed"


def test_prune_heals_at_once(reference: Path, tmp_path: Path) -> None:
    """``edgepress prune --heal linear``: one folder, and the manifest tells both."""
    out = stages.run(
        "prune", Artifact.load(reference), tmp_path / "out", PruneOptions(layers=(4, 5), heal="linear", calibration_tokens=4000)
    )
    facts = out.steps[-1].facts
    assert facts["healed"]["accepted"]
    healed = facts["healed"]["held_out_perplexity"]
    assert healed[1] < healed[0]
