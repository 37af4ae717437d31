"""Distillation helps, resumes, merges in every family, and is rejected when it diverges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.files import sha256
from edgepress.pipeline.heal.distillation import contrast, sentences
from edgepress.pipeline.options import HealOptions, PruneOptions
from families import family_config
from transformers import TrainerState


@pytest.mark.families
def test_lora_helps_merges_and_goes_on(
    pruned: Artifact, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[..., HealOptions]
) -> None:
    """Interrupted after a checkpoint, the same call trains the steps that are left and ends where it would have."""
    from edgepress.pipeline.heal import lora

    changes = {"healer": "lora", "lora_tokens": 12 * 128 * 2, "lora_rank": 4, "contrastive": 0.05, "calibration_tokens": 3000}
    seen: list[int] = []

    class Counting(lora._Bar):
        stop = 7

        def on_step_end(self, args: object, state: TrainerState, control: object, **more: object) -> None:
            seen.append(state.global_step)
            if len(seen) == Counting.stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(lora, "BATCH", 2)
    monkeypatch.setattr("edgepress.pipeline.text.calibration.LONGEST_CALIBRATION_WINDOW", 128)
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
    states = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert float(contrast(states, [states, states])) < float(contrast(states, [states.roll(1, 0), states]))
    states = torch.arange(12.0).reshape(1, 3, 4)
    assert torch.equal(sentences(states, torch.tensor([[True, True, False]])), states[:, :2].mean(1))


@pytest.mark.families
@pytest.mark.usefixtures("short_other_text")
def test_training_that_diverges_is_rejected(
    pruned: Artifact, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Callable[..., HealOptions]
) -> None:
    """NaN is not better; the manifest stays valid JSON and the checkpoint what it was."""
    changes = {"healer": "lora", "lora_tokens": 1500, "learning_rate": 1e9, "calibration_tokens": 1000}
    healed = stages.run("heal", pruned, tmp_path / "healed", options(reference, **changes))
    assert not healed.steps[-1].facts["accepted"]
    assert sha256(healed.path / "model.safetensors") == sha256(pruned.path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["gpt2", "mixtral", *(pytest.param(n, marks=pytest.mark.families) for n in ("qwen3_moe", "gpt_neox"))]
)
def test_lora_merges_in_other_families(
    name: str, text: Path, tmp_path: Path, random_model: Callable[..., Path], options: Callable[..., HealOptions]
) -> None:
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
