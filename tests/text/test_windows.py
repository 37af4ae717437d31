"""Texts and their windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline.errors import ModelError, TextError
from edgepress.pipeline.files import write_json
from edgepress.pipeline.text import windows
from edgepress.pipeline.text.windows import IDS, beginning, load_tokenizer, text_windows


def test_calibration_windows_by_seed(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Drawn from the whole text, the same for the same seed; a .jsonl file is read as its texts."""
    lines = tmp_path / "text.jsonl"
    lines.write_text("\n".join(json.dumps({"text": part}) for part in text.read_text().split("\n\n")))
    ids = np.concatenate([row[1:] for row in text_windows(text, tiny, budget=10**6)]).tolist()
    drawn = [text_windows(text, tiny, budget=1024, shortest=16, seed=seed) for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    firsts = [[row[1:9].tolist() for row in rows] for rows in drawn]
    assert firsts[0] != firsts[2] and len({str(f) for f in firsts[0]}) == len(drawn[0]) == 4
    places = sorted(next(i for i in range(len(ids)) if ids[i : i + 8] == first) for first in firsts[0])
    assert places[-1] > 1024  # not only from its beginning
    assert text_windows(lines, tiny, budget=1024, shortest=16, seed=1)


def test_truncation_in_the_tokenizer_file_cuts_no_text(tiny: Path, copy_of: Callable[..., Path], text: Path) -> None:
    """Fine-tuning saves truncation and padding with the tokenizer."""
    source = copy_of(tiny)
    tokenizer = load_tokenizer(source)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(source / "tokenizer.json"))
    prose = text.read_text()[:2000]
    assert load_tokenizer(source).encode(prose).ids == load_tokenizer(tiny).encode(prose).ids


def test_ids_are_windowed_as_they_are(tiny: Path, tmp_path: Path) -> None:
    """Special tokens within stay, and a document's own BOS at the beginning of a window is not doubled."""
    file = tmp_path / f"text{IDS}"
    np.savez(file, ids=np.array([0, 7, 8, 0, 9, 10, 11, 12]))
    assert beginning(load_tokenizer(tiny)) == [0]
    assert [row.tolist() for row in text_windows(file, tiny, budget=8, length=5)] == [[0, 7, 8, 0, 9], [0, 9, 10, 11, 12]]
    assert text_windows(file, tiny, budget=3, skip=4, length=4)[0].tolist() == [0, 9, 10, 11]


def test_ids_that_cannot_be_used_are_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / f"text{IDS}"
    file.write_bytes(b"no ids")
    with pytest.raises(TextError, match="no whole file"):
        text_windows(file, tiny, budget=8)
    np.savez(file, ids=np.array([5120] * 400))
    with pytest.raises(TextError, match="beyond the 5120 rows"):
        text_windows(file, tiny, budget=8)


@pytest.mark.parametrize(
    "part", [{"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}}, {"model": 5}, {"decoder": []}]
)
def test_a_tokenizer_that_fails_in_use_is_refused_at_once(
    part: dict[str, object], tiny: Path, copy_of: Callable[..., Path]
) -> None:
    """The library loads some whose every encoding is an exception, or a panic of its Rust code."""
    folder = copy_of(tiny)
    content = json.loads((folder / "tokenizer.json").read_text()) | part
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be used"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("vocabulary", "context", "length"), [(49152, 2048, 512), (151936, 32768, 220), (262144, 32768, 128), (256, 96, 64)]
)
def test_windows_of_the_proof_are_shorter_for_a_large_vocabulary(
    vocabulary: int, context: int, length: int, tmp_path: Path
) -> None:
    """Their logits stand in memory several times: a gigabyte for Gemma at 512 tokens."""
    write_json(tmp_path / "config.json", {"vocab_size": vocabulary, "max_position_embeddings": context})
    assert windows.proof_window(tmp_path) == length
