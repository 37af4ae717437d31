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
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks, block_output
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError, OptionError, TextError
from edgepress.pipeline.files import read_json, sha256
from edgepress.pipeline.heal import linear
from edgepress.pipeline.heal.job import Gap, HealJob, gaps_of
from edgepress.pipeline.heal.lora import contrast, sentences
from edgepress.pipeline.heal.stage import heal_folder, kept_layers, record
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import HealOptions, PruneOptions
from edgepress.pipeline.text.calibration import Texts, calibration, split
from edgepress.pipeline.text.windows import text_windows
from families import family_config
from transformers import AutoModelForCausalLM

REMOVED = (4, 5, 9)


@pytest.fixture(scope="module")
def pruned(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The reference model without a run of two layers and one more."""
    options = PruneOptions(remove_layers=REMOVED, calibration=CALIBRATION_TEXT, calibration_tokens=1000)
    return stages.run("prune", Artifact.load(reference), tmp_path_factory.mktemp("heal") / "pruned", options)


@pytest.fixture
def short_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """For healings that are refused: reading all of the shipped other text takes most of their time."""
    monkeypatch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 1600)


def options(original: Path, **changes: Any) -> HealOptions:
    return HealOptions(**({"original": original, "calibration_tokens": 6000} | changes))


def test_gaps_are_seen_from_both_models() -> None:
    """Each gap: the block that stands before it now, and the old block whose input it must give."""
    assert gaps_of([0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 15], 16) == [Gap(3, 6), Gap(6, 10)]
    assert gaps_of([2, 3], 6) == [Gap(-1, 2), Gap(1, 6)]
    assert gaps_of([0, 1], 2) == []


def test_layers_removed_twice_are_counted_in_the_original(pruned: Artifact, reference: Path, tiny: Path, tmp_path: Path) -> None:
    again = stages.run("prune", pruned, tmp_path / "again", PruneOptions(remove_layers=(0, 4), calibration_tokens=500))
    assert kept_layers(again, reference) == ([1, 2, 3, 7, 8, 10, 11, 12, 13, 14, 15], 16)
    assert kept_layers(again, pruned.path) == ([1, 2, 3, *range(5, 13)], 13)
    with pytest.raises(OptionError, match="has 4 layers"):
        kept_layers(again, tiny)


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
    job = HealJob(blocks, [Gap(3, 6)], windows, teacher, [windows], options(reference), tmp_path)
    name, matrix, factor = linear._last_matrix(blocks, 3, windows[0])
    assert (name, factor) == ("model.layers.3.mlp.down_proj", pytest.approx(1, abs=1e-4))
    gram, cross = linear._statistics(job, Gap(3, 6), matrix)
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
    "llama4_text",
    "qwen3_moe",
}


@pytest.mark.parametrize("name", sorted(HEALS | {"gemma2", "gemma3_text", "olmo2", "mixtral", "gpt_oss"}))
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
        job = HealJob(blocks, [Gap(2, 4)], windows, teacher, [windows[:2]], options(folder), tmp_path)
        matrix_name, matrix, factor = linear._last_matrix(blocks, 2, windows[0])
        gram, cross = linear._statistics(job, Gap(2, 4), matrix)
        bias = None if getattr(matrix, "bias", None) is None else matrix.bias.detach().clone()

        def gap() -> float:
            states = [blocks.states(torch.from_numpy(row)[None], [3])[3][0] for row in windows]
            wanted = torch.from_numpy(np.array(teacher[4]))
            return float(((torch.cat(states) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean())

        before = gap()
        linear._set(matrix, matrix.weight.detach().clone(), bias, linear._solve(gram, cross, 1e-3) / factor)
        assert gap() < 0.97 * before, matrix_name


@pytest.mark.parametrize(("family", "scale"), [("llama", 1.0), ("gemma", 1.0), ("granite", 3.0)])
def test_a_gap_at_the_beginning_goes_into_an_untied_embedding(
    family: str, scale: float, text: Path, tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    """No block stands before it. Gemma's table scales what it gives, Granite's model does so after it: only that is divided out."""
    config = family_config(family)
    config.tie_word_embeddings = False
    folder = random_model(config, tmp_path / "model")
    windows = text_windows(text, folder, budget=2000, length=200)
    blocks = Blocks(load_model(folder))
    _, table, factor = linear._embedding(blocks, windows[0])
    assert factor == pytest.approx(scale)
    teacher = record(folder, windows, [1, 7], tmp_path, False)
    with blocks.without([0]):
        job = HealJob(blocks, [Gap(-1, 1)], windows, teacher, [windows[:2]], options(folder), tmp_path)
        gram, cross = linear._statistics(job, Gap(-1, 1), table)
        wanted = torch.from_numpy(np.array(teacher[1]))

        def gap() -> float:
            states = torch.cat([blocks.states(torch.from_numpy(row)[None], [1])[1][0] for row in windows])
            return float(((states - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean())

        gaps = [gap()]
        weight, change = table.weight.detach().clone(), linear._solve(gram, cross, 1e-3)
        for divisor in (factor, 1.2 * factor, factor / 1.2):
            linear._set(table, weight, None, change / divisor)
            gaps.append(gap())
    assert gaps[1] == min(gaps)  # the exact factor is the best one


@pytest.mark.usefixtures("short_other_text")
def test_a_tied_embedding_is_refused(reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pruned"
    pruned = stages.run("prune", Artifact.load(reference), folder, PruneOptions(remove_layers=(0,), calibration_tokens=500))
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, calibration_tokens=1000))
    (method,) = healed.steps[-1].facts["methods"]
    assert not method["accepted"] and "tied to the head" in method["before layer 1"]["not_healed"]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")
    assert any("--healer lora may" in entry.message for entry in caplog.records)


@pytest.mark.usefixtures("short_other_text")
def test_harm_is_refused(pruned: Artifact, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tiny foreign text teaches what does not hold elsewhere: the checkpoint stays bit for bit, and manifest and log say so."""
    foreign = tmp_path / "foreign.txt"
    foreign.write_text(" ".join(str(n * 7919 % 10007) for n in range(400)))
    changes = {"calibration": foreign, "calibration_tokens": 600, "healer": "lora", "lora_tokens": 3000, "learning_rate": 0.05}
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    facts = healed.steps[-1].facts
    assert not facts["accepted"] and not facts["methods"][0]["accepted"]
    rejected = facts["methods"][0]
    assert rejected["rejected_other_perplexity"][1] > rejected["rejected_other_perplexity"][0]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")
    assert any("did not help both kinds of text" in record.message for record in caplog.records)


@pytest.mark.families
def test_a_stored_type_is_kept_and_judged(tmp_path: Path, reference: Path) -> None:
    """A bfloat16 checkpoint stays one, and what was judged is what its rounding left."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    source = tmp_path / "bf16"
    model.save_pretrained(source)
    (source / "tokenizer.json").write_bytes((reference / "tokenizer.json").read_bytes())
    pruned = stages.run(
        "prune", Artifact.load(source), tmp_path / "pruned", PruneOptions(remove_layers=REMOVED, calibration_tokens=1000)
    )
    healed = stages.run("heal", pruned, tmp_path / "healed", options(source, calibration_tokens=8000))
    facts = healed.steps[-1].facts
    assert facts["accepted"]
    assert AutoModelForCausalLM.from_pretrained(healed.path).dtype == torch.bfloat16
    texts: Texts = split(source, options(source, calibration_tokens=8000))
    assert facts["held_out_perplexity"][1] == pytest.approx(np.exp(mean_loss(load_model(healed.path), texts.judging)), rel=1e-4)


@pytest.mark.families
def test_lora_helps_merges_and_goes_on(pruned: Artifact, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after a checkpoint, the same call trains the steps that are left and ends where it would have."""
    from edgepress.pipeline.heal import lora

    changes = {"healer": "lora", "lora_tokens": 12 * 128 * 2, "lora_rank": 4, "contrastive": 0.05, "calibration_tokens": 3000}
    seen: list[int] = []

    class Counting(lora._Bar):
        stop = 7

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(state.global_step)
            if len(seen) == Counting.stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(lora, "BATCH", 2)
    monkeypatch.setattr("edgepress.pipeline.text.calibration.LONGEST_WINDOW", 128)
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
    with pytest.raises(ModelError, match="give a folder that prune wrote"):
        stages.run("heal", Artifact.load(reference), tmp_path / "out", options(reference))


def test_a_foreign_original_is_refused(
    pruned: Artifact, tiny: Path, tmp_path: Path, copy_of: Callable[..., Path], reference: Path
) -> None:
    """One of other depth, and one of the same shape with another embedding, are not what the layers were removed from."""
    from safetensors.torch import load_file, save_file

    other = copy_of(reference)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for original, says in ((tiny, "has 4 layers"), (pruned.path, "has 13 layers"), (other, "model.embed_tokens.weight differs")):
        with pytest.raises(OptionError, match=says):
            stages.run("heal", pruned, tmp_path / "out", options(original))
    assert not (tmp_path / "out").exists()


def test_no_text_judges_what_it_taught(pruned: Artifact, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="judge itself"):
        stages.run("heal", pruned, tmp_path / "out", options(reference, other_text=CALIBRATION_TEXT))
    with pytest.raises(TextError, match="too little text"):
        stages.run("heal", pruned, tmp_path / "out", options(reference, calibration_tokens=100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [300, 514, 1025, 2048, 4096, 5000])
def test_a_quarter_of_the_text_is_held_out(budget: int, reference: Path) -> None:
    """Whatever the number of tokens: a ragged last window must not be all that judges."""
    ranking, held_out = calibration(reference, PruneOptions(remove_count=1, calibration_tokens=budget))
    tokens = sum(map(len, ranking)) + sum(map(len, held_out))
    assert 0.2 <= sum(map(len, held_out)) / tokens <= 0.3 and tokens > 0.75 * budget


@pytest.mark.usefixtures("short_other_text")
def test_training_that_diverges_is_rejected(
    pruned: Artifact, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is not better; the manifest stays valid JSON and the checkpoint what it was."""
    changes = {"healer": "lora", "lora_tokens": 1500, "learning_rate": 1e9, "calibration_tokens": 1000}
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    assert not healed.steps[-1].facts["accepted"]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["gpt2", "mixtral", *(pytest.param(n, marks=pytest.mark.families) for n in ("qwen3_moe", "gpt_neox"))]
)
def test_lora_merges_in_other_families(name: str, text: Path, tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """Transposed matrices and biases; experts that peft cannot leave alone are refused before any training."""
    folder = random_model(family_config(name), tmp_path / name)
    pruned = stages.run(
        "prune", Artifact.load(folder), tmp_path / "p", PruneOptions(remove_layers=(3,), calibration=text, calibration_tokens=600)
    )
    changes = {"healer": "lora", "lora_tokens": 1200, "calibration": text, "calibration_tokens": 600, "learning_rate": 1e-3}
    healed = stages.run("heal", pruned, tmp_path / "h", options(folder, **changes))
    (method,) = healed.steps[-1].facts["methods"]
    assert method["accepted"] != ("not_healed" in method) or "rejected_held_out_perplexity" in method
    assert ("not_healed" in method) == (name == "qwen3_moe")


def test_nothing_removed_nothing_healed(reference: Path, tmp_path: Path) -> None:
    facts = heal_folder(tmp_path, reference, list(range(16)), 16, options(reference))
    assert not facts["accepted"] and facts["why"] == "no layer was removed"
