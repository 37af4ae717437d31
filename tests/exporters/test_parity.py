"""The proof of an export: what it reads, and that it fails for an artifact that differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import load_tokenizer, text_windows

from .conftest import Made


def test_a_wrong_bit_is_caught(fused: Made, text: Path, tmp_path: Path) -> None:
    """The proof must fail for an artifact that differs in one scale: a proof that passes everything proves nothing."""
    packed, exported = fused
    for file in exported.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = ir.load(tmp_path / "model.onnx")
    value = graph.graph.initializers["model.layers.1.mlp.down_proj.scales"]
    assert value.const_value is not None
    scales = value.const_value.numpy().copy()
    scales[3, 0] *= 1.5
    value.const_value = ir.Tensor(scales, name=value.name)
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    windows = text_windows(text, packed.path, budget=512, length=200)
    with pytest.raises(ProofError, match="differs from the checkpoint"):
        parity.prove(ReferenceLogits(load_model(packed.path), windows, tmp_path), tmp_path, graph)


def test_another_most_likely_token_is_no_proof(
    make: Callable[..., Made], tiny: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """However near the logits are, but for ties: here two are exchanged at one position, by a hundredth of what may differ."""
    packed, exported = make(tiny, "none")
    windows, feed = text_windows(text, packed.path, budget=120, length=40), Decoder.feed
    reference = ReferenceLogits(load_model(packed.path), windows, tmp_path)
    truth = reference.logits(windows[1]).copy()
    first, second = np.argsort(truth[7])[::-1][:2]

    def exchanged(gap: float) -> parity.Parity:
        truth[7, second] = truth[7, first] - gap * reference.spread
        np.save(next(tmp_path.glob(f"{hashlib.sha256(windows[1].tobytes()).hexdigest()}*")), truth)
        changed = truth[7, [second, first]]

        def swapped(self: Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
            logits = feed(self, ids, keep)
            if np.array_equal(ids, windows[1]):
                logits[7, [first, second]] = changed
            return logits

        monkeypatch.setattr(Decoder, "feed", swapped)
        return parity.measure(reference, lambda: Decoder(exported.path), 0)

    assert exchanged(0.1 * parity.TIE).flipped == 0
    proof = exchanged(5 * parity.TIE)
    assert proof.flipped == 1 and "1 of 124 positions have another most likely token" in parity.faults(proof, half=False)


def test_tokens_one_by_one_from_as_many_windows_as_it_takes(fused: Made, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    packed, exported = fused
    windows, feed, single = text_windows(text, packed.path, budget=100, length=20), Decoder.feed, []

    def counted(self: Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        single.append(len(ids) == 1 and keep == 0)
        return feed(self, ids, keep)

    monkeypatch.setattr(Decoder, "feed", counted)
    parity.measure(ReferenceLogits(load_model(packed.path), windows, tmp_path), lambda: Decoder(exported.path), 0)
    assert sum(single) == parity.STEPS + len(windows)  # the chunks hold one of one token a window


@pytest.mark.parametrize(("tokens", "whole", "rest"), [(500, 2, True), (690, 3, False), (5000, 3, True)])
def test_what_the_proof_reads(tokens: int, whole: int, rest: bool, tiny: Path, text: Path, tmp_path: Path) -> None:
    """All of a short text, at least 512 tokens of a longer one but no short rest; greedy tokens fit into the context."""
    ids = text_windows(text, tiny, budget=tokens, length=tokens + 1)[0]
    (tmp_path / "text.txt").write_text(load_tokenizer(tiny).decode(ids.tolist()))
    lengths = [len(window) for window in parity.proof_windows(tmp_path / "text.txt", tiny)]
    assert lengths[:whole] == [256 - parity.GREEDY_TOKENS] * whole and len(lengths) == whole + rest
    assert sum(lengths) >= min(tokens, parity.PROOF_TOKENS) and min(lengths) >= 32


def test_a_context_too_short_for_a_proof(tiny: Path, text: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33}))
    with pytest.raises(ModelError, match="33 tokens is too short for the proof of an export, it takes 40"):
        parity.proof_windows(text, tmp_path)
