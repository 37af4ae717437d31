"""Block Influence against first principles, and checkpoints that compute the original with blocks skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models.families import pruned_config, renamed
from edgepress.pipeline.artifact import Artifact, read_json
from edgepress.pipeline.checkpoint import decoder_blocks, load_model
from edgepress.pipeline.errors import ModelError, OptionError, ProofError
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.prune import block_influence, prune
from edgepress.pipeline.tokens import text_windows
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config


def naive_influence(folder: Path, windows: list[np.ndarray]) -> list[float]:
    """Section 3 of the paper, spelled out token by token in float64, running the blocks one by one by hand."""
    model = load_model(folder)
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(model.config.num_hidden_layers)]
    for ids in windows:
        with torch.inference_mode():
            x = model.model.embed_tokens(torch.from_numpy(ids)[None])
            positions = torch.arange(len(ids))[None]
            rotary = model.model.rotary_emb(x, positions)
            mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
            for index, block in enumerate(model.model.layers):
                y = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
                y = y[0] if isinstance(y, tuple) else y
                seen[index] += list(zip(x[0].double().numpy(), y[0].double().numpy(), strict=True))
                x = y
    return [1 - float(np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs])) for pairs in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_influence_is_the_papers(
    dtype: torch.dtype, tmp_path: Path, text: Path, random_model: Callable[..., Path], tiny: Path
) -> None:
    """All blocks, the last one before the final norm, windows of unequal length, float32 and bfloat16 checkpoints."""
    config = LlamaConfig(**read_json(tiny / "config.json"))
    folder = random_model(config, tmp_path / "model", dtype)
    windows = [row[:n] for row, n in zip(text_windows(text, folder, budget=400, length=128), (128, 128, 70), strict=False)]
    found, perplexity = block_influence(load_model(folder), windows)
    assert found == pytest.approx(naive_influence(folder, windows), abs=1e-6)
    assert perplexity > 1


def test_last_block_is_measured_before_the_final_norm(reference: Path, text: Path) -> None:
    """The trap of hidden_states[-1]: taken after the final norm it gives another influence for the last block."""
    model = load_model(reference)
    windows = text_windows(text, reference, budget=64, length=64)
    found, _ = block_influence(model, windows)
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(windows[0])[None], output_hidden_states=True).hidden_states
    wrong = 1 - float(torch.nn.functional.cosine_similarity(states[-2], states[-1], dim=-1).mean())
    assert abs(found[-1] - wrong) > 1e-3


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_pruned_checkpoint_loads_plainly_and_generates_with_its_cache(removed: int, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Plain transformers: logits as with the blocks skipped, cached generation as uncached."""
    out = tmp_path / "pruned"
    out.mkdir()
    options = PruneOptions(remove_layers=removed, calibration=text, calibration_tokens=300)
    facts = prune(Artifact.load(tiny), out, options)
    assert len(facts["removed_layers"]) == removed
    lowest = sorted(np.argsort(facts["influences"])[:removed].tolist())
    assert facts["removed_layers"] == lowest

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.num_hidden_layers == 4 - removed
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(4 - removed))
    original = AutoModelForCausalLM.from_pretrained(tiny).eval()
    original.model.layers = torch.nn.ModuleList(
        block for index, block in enumerate(original.model.layers) if index not in facts["removed_layers"]
    )
    ids = torch.from_numpy(text_windows(text, tiny, budget=48, length=48)[0])[None]
    with torch.inference_mode():
        assert torch.equal(model(ids, use_cache=False).logits, original(ids, use_cache=False).logits)
        settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_weights_keep_dtype_and_bytes(tmp_path: Path, tiny: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """Removal is no conversion: a bfloat16 checkpoint stays one, tensor for tensor."""
    from safetensors import safe_open

    config = LlamaConfig(**read_json(tiny / "config.json"))
    folder = random_model(config, tmp_path / "model", torch.bfloat16)
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(folder), out, PruneOptions(remove_layers=1, calibration=text, calibration_tokens=100))
    kept = [i for i in range(4) if i not in facts["removed_layers"]]
    before, after = safe_open(folder / "model.safetensors", "pt"), safe_open(out / "model.safetensors", "pt")
    for name in after.keys():  # noqa: SIM118
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(kept[int(parts[2])])
        old = before.get_tensor(".".join(parts))
        assert old.dtype == torch.bfloat16 and torch.equal(after.get_tensor(name), old)


def test_per_layer_lists_are_cut_with_the_blocks(tmp_path: Path, text: Path, random_model: Callable[..., Path]) -> None:
    """Transformers refuses a layer_types of the wrong length, and one cut at the wrong place gives wrong windows."""
    config = Gemma2Config(
        vocab_size=5120, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = random_model(config, tmp_path / "gemma2")
    kinds = read_json(folder / "config.json")["layer_types"]
    out = tmp_path / "out"
    out.mkdir()
    facts = prune(Artifact.load(folder), out, PruneOptions(remove_layers=1, calibration=text, calibration_tokens=256))
    left = [kind for index, kind in enumerate(kinds) if index not in facts["removed_layers"]]
    assert read_json(out / "config.json")["layer_types"] == left
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3


def test_a_config_that_cannot_say_it_is_refused(
    tmp_path: Path, text: Path, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that follow from the layer's number shift when the first layer goes: the proof must find it."""
    import edgepress.pipeline.prune as module

    monkeypatch.setattr(module, "block_influence", lambda *_: ([0.0, 1.0, 1.0, 1.0], 1.0))
    config = Gemma2Config(
        vocab_size=5120, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = random_model(config, tmp_path / "gemma2")
    content = read_json(folder / "config.json")
    del content["layer_types"]
    (folder / "config.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ProofError, match="per-layer settings"):
        prune(Artifact.load(folder), out, PruneOptions(remove_layers=1, calibration=text, calibration_tokens=256))


def test_qwen2_window_boundary_moves_with_the_blocks() -> None:
    """max_window_layers counts blocks from the first: those removed below it must be taken off."""
    config = Qwen2Config(num_hidden_layers=6, max_window_layers=4, use_sliding_window=True).to_dict()
    changed = pruned_config(config, "num_hidden_layers", [0, 2, 3, 5])
    assert (changed["num_hidden_layers"], changed["max_window_layers"]) == (4, 3)


def test_names_outside_the_blocks_stay() -> None:
    """Renaming touches the block number alone, also where a later part of the name is a number."""
    assert renamed("model.layers.3.mlp.experts.3.w", "layers", [0, 3]) == "model.layers.1.mlp.experts.3.w"
    assert renamed("model.layers.2.mlp.w", "layers", [0, 3]) is None
    assert renamed("model.norm.weight", "layers", [0, 3]) == "model.norm.weight"
    assert renamed("transformer.h.1.attn.bias", "h", [1]) == "transformer.h.0.attn.bias"


@pytest.mark.parametrize(("fraction", "layers", "amount"), [(0.1, 16, 1), (0.25, 16, 4), (0.3, 5, 1), (0.1, 4, 1), (0.99, 4, 3)])
def test_a_fraction_rounds_down_and_removes_at_least_one(fraction: float, layers: int, amount: int) -> None:
    assert PruneOptions(remove_fraction=fraction).amount(layers) == amount


def test_every_layer_cannot_go() -> None:
    with pytest.raises(OptionError, match="at most 3"):
        PruneOptions(remove_layers=4).amount(4)


def test_nan_names_the_layer(tiny: Path, text: Path) -> None:
    """A broken layer must be named, not hidden in the ranking."""
    model = load_model(tiny)
    _, blocks = decoder_blocks(model)
    with torch.no_grad():
        blocks[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="layer 2"):
        block_influence(model, text_windows(text, tiny, budget=64, length=64))


def test_known_perplexities(shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """The measured values that came with the shared models, by their protocol: full, and without single layers."""
    from edgepress.pipeline.prune import perplexity_of, skipped

    known = {"stories260k": (4.27, [102, 14.6, 9.09, 9.74, 10.1]), "babyllama-361": (2.20, [30.3, 21.4, 9.49, 8.77, 4.81])}
    for name, (full, without) in known.items():
        folder = shared_model(name)
        model = load_model(folder)
        windows = text_windows(tinystories, folder, budget=16000)
        assert perplexity_of(model, windows) == pytest.approx(full, rel=2e-3)
        for index, value in enumerate(without):
            with skipped(model, [index]):
                assert perplexity_of(model, windows) == pytest.approx(value, rel=2e-2)
