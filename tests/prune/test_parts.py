"""Attention or the feed-forward part of a block removed alone: measured, chosen, written, proven and healed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT, REFERENCE
from edgepress.models.families import PARTS
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.least_squares import add_to
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.parts import part_name, within
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.checkpoint.update import replace_tensors
from edgepress.pipeline.errors import ModelError, OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.metrics.torch_scores import divergences, logits_of, mean_loss
from edgepress.pipeline.options import ExportOptions, HealOptions, PruneOptions
from edgepress.pipeline.prune.criteria import Search, bi, choose, greedy
from edgepress.pipeline.prune.parts import HealedPartTrials, Parts, influence_of
from edgepress.pipeline.recipe import _removes
from edgepress.pipeline.text.windows import text_windows
from families import TINY, family_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

QUICK = {"calibration_tokens": 4096, "greedy_tokens": 256, "shortlist": 3}


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    return text_windows(CALIBRATION_TEXT, REFERENCE, budget=3000, length=100)


@contextmanager
def silenced(model: PreTrainedModel, part: str, indices: tuple[int, ...]) -> Iterator[None]:
    """Within the context the outputs of these parts are zeros: plain torch, nothing of edgepress."""
    with ExitStack() as stack:
        for index in indices:
            module = model.get_submodule(f"model.layers.{index}.{PARTS[part].module}.{PARTS[part].output}")
            stack.callback(module.register_forward_hook(lambda module, args, output: torch.zeros_like(output)).remove)
        yield


@pytest.mark.parametrize("part", PARTS)
def test_plain_transformers_computes_the_model_without_the_part(part: str, tmp_path: Path, windows: list[np.ndarray]) -> None:
    options = PruneOptions(parts=part, remove_layers=(3, 9), **QUICK)
    made = stages.run("prune", Artifact.load(REFERENCE), tmp_path / "out", options)
    original, written = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (REFERENCE, made.path))
    ids = torch.from_numpy(windows[0])[None]
    with torch.inference_mode(), silenced(original, part, (3, 9)):
        assert torch.equal(written(input_ids=ids).logits, original(input_ids=ids).logits)
    gone = {part_name(index, part) for index in (3, 9)}
    assert Checkpoint(made.path).silent == gone
    before, after = ShardIndex.of(REFERENCE), ShardIndex.of(made.path)
    assert before.shapes == after.shapes
    for name in before:
        if not within(gone, name):
            assert before.read(name) == after.read(name), name
    facts = made.steps[-1].facts
    assert facts["removed_parts"] == [3, 9] and facts["removed_layers"] == [] and facts["layers"] == [16, 16]
    assert facts["parameters"][0] - facts["parameters"][1] == sum(int(np.prod(before.shapes[n])) for n in before if within(gone, n))
    assert [row["layer"] for row in read_json(made.path / "influence.json")["layers"] if row["removed"]] == [3, 9]


@pytest.mark.parametrize("part", PARTS)
def test_influence_is_how_much_the_part_turns_the_stream(part: str, windows: list[np.ndarray]) -> None:
    model, index = load_model(REFERENCE), 5
    block, seen = model.model.layers[index], dict[str, torch.Tensor]()
    block.register_forward_hook(lambda module, args, output: seen.update(whole=args[0], out=output))
    block.self_attn.register_forward_hook(lambda module, args, output: seen.update(attention=output[0]))
    measured = influence_of(Parts(model, part, ()), windows[:3])
    changes = []
    for row in windows[:3]:
        logits_of(model, row)
        middle = seen["whole"] + seen["attention"]
        pair = (seen["whole"], middle) if part == "attention" else (middle, seen["out"])
        changes.append(1 - torch.cosine_similarity(*pair, dim=-1)[0].double())
    assert measured.block_influence[index] == pytest.approx(float(torch.cat(changes).mean()), rel=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_a_trial_is_the_model_healed_in_the_other_part(part: str, windows: list[np.ndarray]) -> None:
    """Its cost is that of the model without the part and with the change, window by window, nothing shared."""
    model = load_model(REFERENCE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    judging, fitting, other = windows[:3], windows[3:], {"attention": "mlp.down_proj", "feed-forward": "self_attn.o_proj"}[part]
    trials = HealedPartTrials(Parts(model, part, ()), judging, fitting)
    costs = trials.costs([2], [2 + 1, 9], "test")
    changes = trials.changes([2], [3, 9])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for index, cost in costs.items():
        matrix = model.get_submodule(f"model.layers.{index}.{other}")
        assert changes[index].matrix is matrix
        whole = [torch.from_numpy(logits_of(model, row)) for row in judging]
        add_to(matrix, changes[index].added)
        with silenced(model, part, (2, index)):
            rows = [torch.from_numpy(logits_of(model, row)) for row in judging]
        kl = torch.cat([divergences(*pair) for pair in zip(whole, rows, strict=True)]).double().mean()
        assert cost == pytest.approx(float(kl), rel=1e-3)
        model.load_state_dict(before)
        with silenced(model, part, (2, index)):
            plain = [torch.from_numpy(logits_of(model, row)) for row in judging]
        assert cost < float(torch.cat([divergences(*pair) for pair in zip(whole, plain, strict=True)]).double().mean())


def test_what_is_gone_is_not_removed_again(windows: list[np.ndarray]) -> None:
    """It costs nothing and has no influence, so every criterion would take it first."""
    model, absent = load_model(REFERENCE), [0, 1, 2, 15]
    blocks = Parts(model, "attention", absent)
    with torch.no_grad():
        for index in absent:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    search = Search(blocks, influence_of(blocks, windows[:2]), windows[:2], windows[2:4], 2)
    for criterion in (bi, greedy):
        *_, removed = criterion(search, 2)
        assert not {*removed} & {*absent}
    options = PruneOptions(parts="attention", remove_count=2, **QUICK).resolved()
    assert not {*choose(options, 2, blocks, search.influence, windows[:8], windows[8:10], None).removed} & {*absent}
    assert PruneOptions(parts="attention", remove_fraction=0.5).amount(16, absent) == 6
    with pytest.raises(OptionError, match="at most 11"):
        PruneOptions(parts="attention", remove_count=12).amount(16, absent)
    with pytest.raises(OptionError, match="layer 15 was removed before"):
        PruneOptions(parts="attention", remove_layers=(3, 15)).amount(16, absent)


def test_what_cannot_be_is_refused(random_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="angular looks at runs of blocks"):
        PruneOptions(parts="attention", criterion="angular", remove_count=1)
    model = Artifact.load(random_model(family_config("gpt2"), tmp_path / "gpt2"))
    with pytest.raises(ModelError, match=r"--parts attention is for .*llama.*, not gpt2"):
        stages.run("prune", model, tmp_path / "out", PruneOptions(parts="attention", remove_layers=(1,)))
    assert not (tmp_path / "out").exists()


@pytest.mark.families
def test_healing_lets_the_other_part_make_up_for_it(tmp_path: Path, windows: list[np.ndarray]) -> None:
    """A block and a part go; the loss falls on text of the kind that taught, and what is gone stays gone."""
    parts = PruneOptions(parts="attention", remove_layers=(2, 15), **QUICK)
    whole = PruneOptions(remove_layers=(4,), **QUICK)
    made = stages.run("prune", Artifact.load(REFERENCE), tmp_path / "parts", parts)
    made = stages.run("prune", made, tmp_path / "blocks", whole)
    gone = {part_name(index, "attention") for index in (2, 14)}  # the second one layer lower
    assert Checkpoint(made.path).silent == gone
    options = HealOptions(original=REFERENCE, calibration_tokens=8192)
    healed = stages.run("heal", made, tmp_path / "healed", options)
    facts = healed.steps[-1].facts
    changed = {k: v for k, v in facts["methods"][0].items() if k.startswith("before")}
    assert {where: row["matrix"] for where, row in changed.items()} == {
        "before layer 3": "model.layers.2.mlp.down_proj",
        "before layer 5": "model.layers.3.mlp.down_proj",
        "before layer 16": "model.layers.14.mlp.down_proj",
    }
    assert facts["accepted"] and Checkpoint(healed.path).silent == gone
    assert mean_loss(load_model(healed.path), windows[:8]) < mean_loss(load_model(made.path), windows[:8])


def test_names_without_the_prefix_of_the_base_model(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """As a base model's checkpoint has them: removed, seen, and computed without all the same."""
    model = random_model(LlamaConfig(**TINY), tmp_path / "model")
    file = model / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    made = stages.run("prune", Artifact.load(model), tmp_path / "out", PruneOptions(parts="attention", remove_layers=(1,), **QUICK))
    assert Checkpoint(made.path).silent == {part_name(1, "attention")}
    assert not load_file(made.path / "model.safetensors")["layers.1.self_attn.q_proj.weight"].any()


def test_some_attention_has_to_stay(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Over several removals, too: without any no token would see another."""
    model = random_model(LlamaConfig(**TINY), tmp_path / "model")
    few = PruneOptions(parts="attention", remove_layers=(0, 1, 2), **QUICK)
    made = stages.run("prune", Artifact.load(model), tmp_path / "few", few)
    with pytest.raises(ModelError, match="without layers 3 no layer would have attention"):
        stages.run("prune", made, tmp_path / "refused", PruneOptions(remove_layers=(3,), **QUICK))
    output = "model.layers.3.self_attn.o_proj.weight"
    replace_tensors(made.path, {output: torch.zeros(Checkpoint(made.path).shapes[output])})
    made = Artifact.load(shutil.copytree(made.path, tmp_path / "blind", ignore=shutil.ignore_patterns("manifest.json")))
    with pytest.raises(ModelError, match="no layer of this model has attention any more"):
        stages.run("export", made, tmp_path / "onnx", ExportOptions())
    with pytest.raises(OptionError, match="no layer has its attention part any more"):
        stages.run("prune", made, tmp_path / "more", PruneOptions(parts="attention", remove_count=1, **QUICK))


def test_a_part_that_is_no_number_is_named(windows: list[np.ndarray]) -> None:
    model = load_model(REFERENCE)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.mul_(1e38)
    with pytest.raises(ModelError, match="layer 4 is not finite"):
        influence_of(Parts(model, "feed-forward", ()), windows[:1])


def test_a_removed_part_is_a_change(tmp_path: Path) -> None:
    """It decides what a build's report shows, and whether a build is compared with the whole model."""
    made = stages.run(
        "prune", Artifact.load(REFERENCE), tmp_path / "out", PruneOptions(parts="attention", remove_layers=(3,), **QUICK)
    )
    assert made.changed and _removes(made.steps[-1])
