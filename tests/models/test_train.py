"""The training script on two short texts: it stops, goes on, and leaves a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from edgepress.models import CALIBRATION_TEXT, EVALUATION_TEXT, REFERENCE
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.families
def test_training_stops_goes_on_and_finishes(tmp_path: Path) -> None:
    """Interrupted after four of eight steps; other settings in the same folder are refused."""
    books = tmp_path / "books"
    books.mkdir()
    for text in (CALIBRATION_TEXT, EVALUATION_TEXT):
        shutil.copy(text, books)

    def train(*more: str, held_out: str = "evaluation") -> subprocess.CompletedProcess[str]:
        small = ["--tokens", "8192", "--batch", "2", "--layers", "2", "--vocabulary", "600", "--warm-up", "2", "--no-compile"]
        command = [sys.executable, str(REFERENCE / "train.py"), str(books), str(tmp_path / "out"), *small]
        return subprocess.run([*command, "--held-out", held_out, *more], capture_output=True, text=True)

    assert train("--stop-after", "4").returncode == 0
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert "other books" in train(held_out="calibration").stderr
    done = train()
    assert done.returncode == 0 and "going on from step 4 of 8" in done.stdout, done.stderr
    facts = json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())
    assert facts["steps"] == 8 and 0 < facts["held_out_bits_per_byte"]["all"] < 12
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoint")("The river")["input_ids"]
    assert model.config.num_hidden_layers == 2 and ids[0] == model.config.bos_token_id
