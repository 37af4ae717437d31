"""The decoder: positions of the logits, and its cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.runtime import decoder as runtime
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows


@pytest.fixture(scope="module")
def artifact(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama, 4 bits wide, in the fused graph."""
    folder = tmp_path_factory.mktemp("decoder")
    packed = stages.run("quantize", Artifact.load(tiny), folder / "packed", QuantizeOptions(method="rtn", group_size=32))
    return stages.run("export", packed, folder / "onnx", ExportOptions(text=text)).path


def test_one_file_gives_last_or_all_positions(artifact: Path, text: Path) -> None:
    """logits_to_keep: 1 by default, 0 is all; a consumer that does not know it never sees it."""
    decoder = Decoder(artifact)
    ids = text_windows(text, artifact, budget=40, length=40)[0]
    every = decoder.feed(ids, keep=0)
    decoder.reset()
    last = decoder.feed(ids)
    assert every.shape == (len(ids), 5120) and last.shape == (1, 5120)
    assert np.allclose(every[-1], last[0], atol=1e-5)
    assert "logits_to_keep" not in [value.name for value in decoder.session.get_inputs()]


def test_the_shared_cache_grows(artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that outgrows its buffer, token by token and by pieces, computes what one piece computes."""
    monkeypatch.setattr(runtime, "FIRST_CAPACITY", 32)
    ids = text_windows(text, artifact, budget=200, length=200)[0]
    whole = Decoder(artifact).feed(ids, keep=0)
    decoder = Decoder(artifact)
    pieces = [decoder.feed(piece, keep=0) for piece in np.split(ids, [30, *range(31, 70), 150])]
    assert 200 <= decoder._capacity <= decoder.context
    assert np.allclose(whole, np.concatenate(pieces), atol=0.2 * whole.std())  # int8 activations round differently


@pytest.mark.parametrize("capacity", [40, 256])
def test_the_cache_forgets_on_reset(artifact: Path, text: Path, capacity: int) -> None:
    """A sequence must not see the one before it, whatever the size of the shared buffer."""
    decoder = Decoder(artifact)
    assert decoder.shared
    ids = text_windows(text, artifact, budget=80, length=40)
    decoder.reset(capacity)
    first = decoder.feed(ids[0], keep=0)
    decoder.reset(capacity)
    decoder.feed(ids[1])
    decoder.reset(capacity)
    assert np.array_equal(decoder.feed(ids[0], keep=0), first)
    with pytest.raises(OptionError, match="context"):
        decoder.feed(np.zeros(capacity, dtype=np.int64))
