"""The heal stage: a guard that refuses harm, stored types, and what it refuses to begin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError, OptionError, TextError
from edgepress.pipeline.files import sha256
from edgepress.pipeline.heal.stage import heal_checkpoint
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import HealOptions, PruneOptions
from edgepress.pipeline.text.calibration import HealingSets, healing_sets
from transformers import AutoModelForCausalLM


@pytest.mark.families
@pytest.mark.usefixtures("short_other_text")
def test_harm_is_refused(
    pruned: Artifact, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: Callable[..., HealOptions]
) -> None:
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
def test_a_stored_type_is_kept_and_judged(tmp_path: Path, reference: Path, options: Callable[..., HealOptions]) -> None:
    """A bfloat16 checkpoint stays one, and what was judged is what its rounding left."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.bfloat16)
    source = tmp_path / "bf16"
    model.save_pretrained(source)
    (source / "tokenizer.json").write_bytes((reference / "tokenizer.json").read_bytes())
    pruned = stages.run(
        "prune", Artifact.load(source), tmp_path / "pruned", PruneOptions(remove_layers=(4, 5, 9), calibration_tokens=1000)
    )
    healed = stages.run("heal", pruned, tmp_path / "healed", options(source, calibration_tokens=8000))
    facts = healed.steps[-1].facts
    assert facts["accepted"]
    assert AutoModelForCausalLM.from_pretrained(healed.path).dtype == torch.bfloat16
    texts: HealingSets = healing_sets(source, options(source, calibration_tokens=8000))
    assert facts["held_out_perplexity"][1] == pytest.approx(np.exp(mean_loss(load_model(healed.path), texts.judging)), rel=1e-4)


def test_heal_needs_an_original_and_a_pruned_checkpoint(
    pruned: Artifact, reference: Path, tmp_path: Path, options: Callable[..., HealOptions]
) -> None:
    with pytest.raises(OptionError, match="give --original"):
        stages.run("heal", pruned, tmp_path / "out", HealOptions())
    with pytest.raises(ModelError, match="give a folder that prune wrote"):
        stages.run("heal", Artifact.load(reference), tmp_path / "out", options(reference))


def test_no_text_judges_what_it_taught(
    pruned: Artifact, reference: Path, tmp_path: Path, options: Callable[..., HealOptions]
) -> None:
    with pytest.raises(OptionError, match="judge what it taught"):
        stages.run("heal", pruned, tmp_path / "out", options(reference, other_text=CALIBRATION_TEXT))
    with pytest.raises(TextError, match="too little text"):
        stages.run("heal", pruned, tmp_path / "out", options(reference, calibration_tokens=100))
    assert list(tmp_path.iterdir()) == []


def test_nothing_removed_nothing_healed(reference: Path, tmp_path: Path, options: Callable[..., HealOptions]) -> None:
    copy = shutil.copytree(reference, tmp_path / "copy")
    facts = heal_checkpoint(Checkpoint(copy), Checkpoint(reference), list(range(16)), options(reference))
    assert not facts["accepted"] and facts["why"] == "nothing was removed"


def test_an_unchanged_checkpoint_is_not_written_again(
    tiny: Path, text: Path, tmp_path: Path, options: Callable[..., HealOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer removed: the folders that edgepress wrote share the weights, a user's own is copied, and each is whole alone."""
    loads: list[Path] = []
    model = Checkpoint.model
    monkeypatch.setattr(Checkpoint, "model", lambda self: loads.append(self.path) or model(self))
    nothing = PruneOptions(remove_count=0, shortlist=1, greedy_tokens=64, calibration=text, calibration_tokens=256)
    pruned = stages.run("prune", Artifact.load(tiny), tmp_path / "pruned", nothing)
    assert pruned.steps[-1].facts["removed_layers"] == [] and loads == [tiny]
    again = stages.run("prune", pruned, tmp_path / "again", nothing)
    healed = stages.run("heal", again, tmp_path / "healed", options(tiny))
    weights = [folder / "model.safetensors" for folder in (tiny, pruned.path, again.path, healed.path)]
    own, *ours = [(file.stat().st_dev, file.stat().st_ino) for file in weights]
    assert len(set(ours)) == 1 and own not in ours
    shutil.rmtree(again.path)
    assert not healed.damaged() and not pruned.damaged() and sha256(weights[0]) == sha256(weights[3])
    assert torch.equal(next(load_model(healed.path).parameters()), next(load_model(tiny).parameters()))
