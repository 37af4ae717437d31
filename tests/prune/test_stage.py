"""The prune stage: what it writes, what it records, and the proof that refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune import stage
from edgepress.pipeline.prune.stage import prune
from edgepress.pipeline.text.calibration import calibration
from safetensors import safe_open
from transformers import Gemma2Config, LlamaConfig


def gemma2(layers: int = 4) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=5120, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def test_what_follows_from_a_layers_number_is_written_out(tmp_path: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """A config.json as first published, without layer_types: transformers derives them from the number, which shifts."""
    folder = random_model(gemma2(), tmp_path / "gemma2")
    content = read_json(folder / "config.json")
    kinds = content.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    prune(Artifact.load(folder), out, PruneOptions(remove_layers=(0,), calibration=text, calibration_tokens=256))
    assert read_json(out / "config.json")["layer_types"] == kinds[1:]


def test_the_proof_finds_what_the_structure_does_not_show(
    tmp_path: Path, text: Path, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check of the config, a sliding window on the wrong layers must still not pass."""
    folder = random_model(gemma2(), tmp_path / "gemma2")
    content = read_json(folder / "config.json")
    del content["layer_types"]
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(stage, "pruned_config", lambda checkpoint, kept: content | {"num_hidden_layers": len(kept)})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ProofError, match="per-layer settings"):
        prune(Artifact.load(folder), out, PruneOptions(remove_layers=(0,), calibration=text, calibration_tokens=256))


def test_weights_keep_dtype_and_bytes(tmp_path: Path, tiny: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """Removal is no conversion: a bfloat16 checkpoint stays one, tensor for tensor."""
    config = LlamaConfig(**read_json(tiny / "config.json"))
    folder = random_model(config, tmp_path / "model", torch.bfloat16)
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(folder), out, PruneOptions(remove_count=1, calibration=text, calibration_tokens=100))
    kept = [i for i in range(4) if i not in facts["removed_layers"]]
    before, after = safe_open(folder / "model.safetensors", "pt"), safe_open(out / "model.safetensors", "pt")
    for name in after.keys():  # noqa: SIM118
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        old = before.get_tensor(".".join(parts))
        assert old.dtype == torch.bfloat16 and torch.equal(after.get_tensor(name), old)


def test_the_manifest_says_how_layers_were_chosen(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Before and after are of held-out text, which the ranking never saw."""
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(tiny), out, PruneOptions(remove_count=2, calibration=text, calibration_tokens=1000))
    assert facts["criterion"] == "healed" and facts["layers"] == [4, 2] and len(facts["removed_layers"]) == 2
    assert facts["evaluations"] >= 4 + 3
    positions = facts["calibration"]
    ranking, held_out = calibration(tiny, PruneOptions(remove_count=2, calibration=text, calibration_tokens=1000))
    assert positions["held_out_positions"] == sum(map(len, held_out)) and positions["ranking_positions"] == sum(map(len, ranking))
    assert not {row.tobytes() for row in ranking} & {row.tobytes() for row in held_out}
    assert facts["held_out_perplexity"] == pytest.approx(
        [np.exp(mean_loss(load_model(f), held_out)) for f in (tiny, out)], rel=1e-4
    )
