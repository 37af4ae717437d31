"""Block Influence and angular distance against first principles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks, decoder_blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.prune.influence import measure_influence
from edgepress.pipeline.text.windows import padded, text_windows
from transformers import LlamaConfig


def naive_states(folder: Path, windows: list[np.ndarray]) -> list[np.ndarray]:
    """The residual stream of every token, (blocks + 1, hidden) in float64, running the blocks one by one by hand, unpadded."""
    model = load_model(folder)
    seen = []
    for ids in windows:
        with torch.inference_mode():
            x = model.model.embed_tokens(torch.from_numpy(ids)[None])
            positions = torch.arange(len(ids))[None]
            rotary = model.model.rotary_emb(x, positions)
            mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
            states = [x[0].double().numpy()]
            for block in model.model.layers:
                y = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
                x = y[0] if isinstance(y, tuple) else y
                states.append(x[0].double().numpy())
        seen += list(np.stack(states, axis=1))
    return seen


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_definitions(
    dtype: torch.dtype, tmp_path: Path, text: Path, random_model: Callable[..., Path], tiny: Path
) -> None:
    """All blocks, the last one before the final norm, padding in the batch, float32 and bfloat16 checkpoints."""
    folder = random_model(LlamaConfig(**read_json(tiny / "config.json")), tmp_path / "model", dtype)
    windows = [row[:n] for row, n in zip(text_windows(text, folder, budget=400, length=128), (128, 37, 70), strict=False)]
    (_, real), *more = padded(windows, 8)
    assert not more and not real.all()  # the batch is padded indeed
    influence = measure_influence(Blocks(load_model(folder)), windows, [1, 2, 4])
    states = naive_states(folder, windows)
    naive = [1 - np.mean([cosine(x[i], x[i + 1]) for x in states]) for i in range(4)]
    assert influence.block_influence == pytest.approx(naive, abs=1e-6)
    for length in (1, 2, 4):
        angles = [np.mean([np.arccos(cosine(x[i], x[i + length])) / np.pi for x in states]) for i in range(5 - length)]
        assert influence.angular_distance(length) == pytest.approx(angles, abs=1e-5)


def test_last_block_is_measured_before_the_final_norm(reference: Path, text: Path) -> None:
    """The trap of hidden_states[-1]: taken after the final norm it gives another influence for the last block."""
    model = load_model(reference)
    windows = text_windows(text, reference, budget=64, length=64)
    measured = measure_influence(Blocks(model), windows).block_influence
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(windows[0])[None], output_hidden_states=True).hidden_states
    wrong = 1 - float(torch.nn.functional.cosine_similarity(states[-2], states[-1], dim=-1).mean())
    assert abs(measured[-1] - wrong) > 1e-3


def test_stability_is_the_rank_correlation_of_the_halves(reference: Path, text: Path) -> None:
    """Spearman's formula for ranks without ties, on influences measured on each half alone."""
    model = load_model(reference)
    windows = text_windows(text, reference, budget=512, length=64)
    blocks = Blocks(model)
    ranks = [np.argsort(np.argsort(measure_influence(blocks, windows[part::2]).block_influence)) for part in (0, 1)]
    n = len(blocks)
    spearman = 1 - 6 * int(((ranks[0] - ranks[1]) ** 2).sum()) / (n * (n * n - 1))
    assert measure_influence(blocks, windows).stability() == pytest.approx(spearman, abs=1e-4)
    assert measure_influence(blocks, windows[:1]).stability() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_layer(value: float, tiny: Path, text: Path) -> None:
    """A broken layer must be named, not hidden in the ranking."""
    model = load_model(tiny)
    _, blocks = decoder_blocks(model)
    with torch.no_grad():
        blocks[2].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ModelError, match="layer 2"):
        measure_influence(Blocks(model), text_windows(text, tiny, budget=64, length=64))


def test_a_state_of_zeros_is_no_fault(tiny: Path, text: Path) -> None:
    """A padding token's embedding is zero in many models; should it occur as a token, its angle is undefined, not NaN."""
    model = load_model(tiny)
    windows = text_windows(text, tiny, budget=64, length=64)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(windows[0][5])] = 0
    assert np.isfinite(measure_influence(Blocks(model), windows).block_influence).all()
