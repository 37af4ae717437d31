"""Rotary frequencies that change with the length of the text: no cache is kept across a change, and the proof crosses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.models.rotary import switches
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.metrics.torch_scores import batches, greedy_rows, greedy_tokens
from edgepress.pipeline.options import ExportOptions, VerifyOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.runtime.generate import tokens
from edgepress.pipeline.runtime.lookup import Lookup
from edgepress.pipeline.verify.checks import verify
from families import TINY
from transformers import LlamaConfig, Phi3Config, PreTrainedModel

SWITCH, CONTEXT = 100, 256
IDS = np.random.default_rng(0).integers(3, 5120, CONTEXT)


@pytest.fixture(scope="module")
def phi3(random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LongRoPE as Phi-3 to Phi-4-mini have it, with factors so far apart that a kept cache is seen."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH}
    rope |= {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.0 + 4.0 * i for i in range(8)]}
    config = Phi3Config(**TINY | {"num_hidden_layers": 2}, pad_token_id=0, rope_parameters=rope)
    config.original_max_position_embeddings = SWITCH
    return random_model(config, tmp_path_factory.mktemp("longrope") / "phi3")


@pytest.fixture(scope="module")
def exported(phi3: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return stages.run("export", Artifact.load(phi3), tmp_path_factory.mktemp("longrope") / "onnx", ExportOptions(text=text))


@pytest.fixture(scope="module")
def model(phi3: Path) -> PreTrainedModel:
    return load_model(phi3)


def last(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Plain transformers: logits of the last of ids (tokens,), all read at once."""
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0, -1].numpy()
    return logits


class Foretold(Lookup):
    """Guesses as many of the next tokens as it may, and all of them are right."""

    guessed = 0

    def __init__(self, text: list[int], read: int) -> None:
        self.text, self.read = text, read

    def append(self, id: int) -> None:
        """As Lookup's."""
        self.read += 1

    def guess(self, limit: int) -> list[int]:
        """As Lookup's."""
        guess = self.text[self.read :][:limit]
        self.guessed += len(guess)
        return guess


def test_token_by_token_across_the_switch(exported: Artifact, model: PreTrainedModel) -> None:
    """As whole prompts on either side of it: also after a step back, and in one piece that leads across."""
    decoder = Decoder(exported.path)
    assert decoder.switches == (SWITCH,)
    decoder.feed(IDS[: SWITCH - 3])
    for length in range(SWITCH - 2, SWITCH + 4):
        assert np.allclose(decoder.feed(IDS[length - 1 : length])[0], last(model, IDS[:length]), atol=1e-4), length
    decoder.rewind(50)
    assert np.allclose(decoder.feed(IDS[50:60])[0], last(model, IDS[:60]), atol=1e-4)
    new = decoder.feed(IDS[60:120], keep=0)
    assert new.shape == (60, 5120) and np.allclose(new[-1], last(model, IDS[:120]), atol=1e-4)
    decoder.rewind(110)
    assert np.allclose(decoder.feed(IDS[110:112])[0], last(model, IDS[:112]), atol=1e-4)


def test_greedy_tokens_are_those_of_transformers(exported: Artifact, model: PreTrainedModel) -> None:
    """Alone and in a batch; transformers' own generate drops the cache at the switch too."""
    prompt, count = IDS[: SWITCH - 6], 16
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
    theirs = model.generate(torch.from_numpy(prompt)[None], **settings)[0, len(prompt) :].tolist()
    assert list(Decoder(exported.path).greedy(prompt, count)) == theirs
    assert greedy_tokens(model, prompt, count) == theirs
    other = IDS[SWITCH : SWITCH + len(prompt)]
    assert greedy_rows(model, np.stack([other, prompt]), count) == [greedy_tokens(model, other, count), theirs]
    lookup = Foretold([*prompt.tolist(), *theirs], len(prompt))
    assert list(tokens(Decoder(exported.path), prompt, frozenset(), count, lambda row: int(row.argmax()), lookup)) == theirs
    assert lookup.guessed > count / 2
    steps = Decoder(exported.path).greedy_batch(np.stack([prompt, prompt]))
    assert [next(steps).tolist() for _ in range(count)] == [[token, token] for token in theirs]


def test_rows_of_a_batch_have_their_own_frequencies(exported: Artifact, model: PreTrainedModel) -> None:
    """A short row beside a long one is read as if it were alone."""
    rows = [IDS[:40], IDS[: SWITCH + 20], IDS[:SWITCH]]
    for row, logits in zip(rows, Decoder(exported.path).forward(rows), strict=True):
        assert logits.shape == (len(row), 5120) and np.allclose(logits[-1], last(model, row), atol=1e-4)
    assert [tuple(ids.shape) for ids, _ in batches(model, [rows[1], rows[1], rows[0]])] == [(2, SWITCH + 20), (1, 40)]


def test_the_proof_crosses_the_switch(
    exported: Artifact, phi3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that keeps its cache is no proof; verify looks there too."""
    facts = exported.steps[-1].facts
    assert facts["rotary_switches"] == [SWITCH] and 0 < facts["parity"][0]["difference_switch"] < 1e-3
    options = VerifyOptions(original=phi3, text=text)
    assert [check.state for check in verify(exported.path, options)] == ["ok"] * 7
    monkeypatch.setattr(Decoder, "_side", lambda self, length: 0)
    check = list(verify(exported.path, options))[-1]
    assert check.state == "failed" and "logits differ" in check.detail
    reference = ReferenceLogits(load_model(phi3), parity.proof_windows(text, phi3, (SWITCH,)), tmp_path)
    with pytest.raises(ProofError, match="only where the rotary frequencies change"):
        parity.prove(reference, exported.path, ir.load(exported.path / "model.onnx"))


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])  # 5 s to trace
def test_dynamic_frequencies_within_the_context(
    exporter: str, random_model: Callable[..., Path], text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are fixed there, and the artifact ends there: its logits are those of transformers, and the log says so."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = LlamaConfig(**TINY | {"num_hidden_layers": 1}, rope_parameters=rope)
    folder = random_model(config, tmp_path / "llama")
    assert switches(config) == ()
    with caplog.at_level("INFO"):
        artifact = stages.run("export", Artifact.load(folder), tmp_path / "onnx", ExportOptions(text=text, exporter=exporter))
    assert f"the context ends at {CONTEXT} tokens" in caplog.text
    logits = Decoder(artifact.path).feed(IDS, keep=0)
    assert np.allclose(logits[-1], last(load_model(folder), IDS), atol=1e-4) and Decoder(artifact.path).context == CONTEXT
