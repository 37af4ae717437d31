"""What a model writes: by its own probabilities, document after document, with every special token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.models import PROMPTS
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.own_text import sampler
from edgepress.pipeline.own_text.openings import Openings
from edgepress.pipeline.own_text.sampler import _Row, sample
from families import FAMILIES, TINY
from transformers import CONFIG_MAPPING, LlamaConfig

TEMPLATE = "{{ bos_token }}user: {{ messages[0]['content'] }}\nanswer:"
ENDS = frozenset(range(100, 1000))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_every_id_is_drawn_by_the_model_from_its_own_document_alone(
    family: str, random_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed without a cache and without a batch: what ended before, masks and positions change nothing.

    GPT-2 learns absolute positions, BLOOM takes none.
    """
    tiny = random_model(CONFIG_MAPPING[family](**FAMILIES[family]), tmp_path / family)
    openings = Openings([0], [[5, 6, 7]], ENDS, 5120)
    monkeypatch.setattr(Openings, "of", lambda checkpoint: openings)
    monkeypatch.setattr(sampler, "dtype", lambda _: torch.float32)
    monkeypatch.setattr(sampler, "LONGEST", 48)
    ids = sample(Checkpoint(tiny), 3 * 48, seed=3).tolist()
    model, documents = Checkpoint(tiny).model(), 0
    for number in range(3):
        row, random, place, count = ids[48 * number : 48 * number + 48], np.random.default_rng((3, number)), 0, number
        while place < len(row):
            begin, count, documents = place, count + 1, documents + 1
            opening = openings.draw(count, random)
            assert row[place : place + len(opening)] == opening[: len(row) - place]
            place += len(opening)
            while place < len(row):
                with torch.inference_mode():
                    sums = torch.softmax(model(torch.tensor([row[begin:place]])).logits[0, -1], -1).cumsum(-1).numpy()
                place += 1
                chance = random.random() * sums[-1]
                expected = int(np.searchsorted(sums, chance, side="right"))
                # A batch adds in another order on some processors: only a chance at the very border may fall on its other side.
                border = sums[min(expected, row[place - 1])]
                assert row[place - 1] == expected or (abs(row[place - 1] - expected) == 1 and abs(border - chance) < 1e-6)
                if row[place - 1] in ENDS:
                    break
    assert documents > 8


def test_a_text_ends_and_the_next_begins() -> None:
    """The end stays in the text; where it is also what begins one, it stands there once."""
    row = _Row(Openings([1], [], frozenset({8}), 10), np.random.default_rng(0), 0)
    assert [row.next(0, 0), row.next(1, 8), row.begin] == [1, 8, 0]
    assert [row.next(2, 7), row.begin, row.next(3, 7), row.begin] == [1, 2, 7, 2]
    row = _Row(Openings([8], [], frozenset({8}), 10), np.random.default_rng(0), 0)
    assert [row.next(0, 0), row.next(1, 8), row.begin, row.next(2, 7), row.begin] == [8, 8, 1, 7, 1]


def test_a_short_text_is_written_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def written(model: object, rows: list[object], length: int, *_: object) -> list[np.ndarray]:
        batches.append(len(rows))
        return [np.zeros(length, dtype=np.int64)] * len(rows)

    monkeypatch.setattr(sampler, "_written", written)
    monkeypatch.setattr(sampler, "SHORTEST", 8)
    for tokens in (320, 333, 1000):
        assert len(sampler.sample(Checkpoint(tiny), tokens, 0)) == tokens
    assert len(batches) == 3 and max(batches) <= sampler.ROWS


def test_a_model_too_large_for_the_gpu_writes_on_the_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(checkpoint: Checkpoint, tokens: int, seed: int, device: torch.device) -> np.ndarray:
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        return np.zeros(tokens, dtype=np.int64)

    monkeypatch.setattr(sampler, "training_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(sampler, "_sampled", sampled)
    assert len(sampler.sample(Checkpoint(tiny), 64, 0)) == 64


def test_same_seed_same_ids(tiny: Path) -> None:
    first, again, other = (sample(Checkpoint(tiny), 100, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and len(first) == 100


def test_a_context_is_never_exceeded(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """No row is longer than the model's context."""
    short = random_model(LlamaConfig(**TINY | {"max_position_embeddings": 16}), tmp_path / "short")
    ids = sample(Checkpoint(short), 40, 0)
    assert len(ids) == 40 and ids[[0, 16, 32]].tolist() == [0, 0, 0]


def test_a_chat_model_is_asked_in_its_own_template(tiny: Path, copy_of: Callable[..., Path]) -> None:
    """Every other document; the prompt and its special tokens are part of the text."""
    folder = copy_of(tiny)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    checkpoint = Checkpoint(folder)
    openings, prompts = Openings.of(checkpoint), PROMPTS.read_text().splitlines()
    assert len(openings.chats) == len(prompts) and 40 <= len(set(prompts)) == len(prompts) <= 60
    asked = checkpoint.tokenizer.encode(f"<|endoftext|>user: {prompts[0]}\nanswer:", add_special_tokens=False).ids
    assert openings.chats[0] == asked and asked[0] == 0
    ids = sample(checkpoint, 512, 0).tolist()
    assert any(ids[: len(chat)] == chat for chat in openings.chats) and ids[256] == 0 and ids[257] != asked[1]


def test_an_opening_of_tokens_that_have_no_row_is_left_out(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ChatML's tokens are often added to a tokenizer whose model was never enlarged."""
    unknown = Openings.of(Checkpoint(tiny)).known
    monkeypatch.setattr("edgepress.pipeline.own_text.openings._chats", lambda _: [[1, unknown], [1, 2]])
    monkeypatch.setattr("edgepress.pipeline.own_text.openings.beginning", lambda _: [unknown])
    openings = Openings.of(Checkpoint(tiny))
    assert openings.chats == [[1, 2]] and all(id < unknown for id in openings.plain)


def test_a_template_that_cannot_be_used_is_left_aside(
    tiny: Path, copy_of: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(tiny)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    monkeypatch.setattr(logging.getLogger("edgepress"), "propagate", True)
    assert Openings.of(Checkpoint(folder)).chats == [] and "without its chat template" in caplog.text


def test_ids_that_mean_nothing_are_never_drawn(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Embeddings are padded to round numbers of rows."""
    wide = random_model(LlamaConfig(**TINY | {"vocab_size": 8192}), tmp_path / "wide")
    assert sample(Checkpoint(wide), 256, 0).max() < 5120


def test_a_tokenizer_without_a_beginning_or_an_end(tiny: Path, copy_of: Callable[..., Path], reference: Path) -> None:
    assert Openings.of(Checkpoint(reference)).plain == [0]
    folder = copy_of(tiny, bos_token_id=None, eos_token_id=None)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    openings = Openings([], [], frozenset(), 5120)
    assert len(openings.draw(1, np.random.default_rng(0))) == 1
    assert len(sample(Checkpoint(folder), 64, 0)) == 64


def test_logits_that_are_no_numbers_end_in_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpoint(tiny).model()
    model.lm_head.weight.data.fill_(float("nan"))
    monkeypatch.setattr(Checkpoint, "model", lambda checkpoint: model)
    with pytest.raises(ModelError, match="not finite"):
        sample(Checkpoint(tiny), 64, 0)
