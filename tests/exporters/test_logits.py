"""`export --logits all`: who asks for nothing gets every position; who asks gets what is asked for, as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import ExportOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])
def test_every_position_or_the_last(exporter: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    """A plain session that knows no logits_to_keep; GenAI goes by the shape that is declared."""
    ids = text_windows(text, tiny, budget=12, length=12)[0]
    found = {}
    for logits in ("last", "all"):
        options = ExportOptions(exporter=exporter, logits=logits, text=text)
        folder = stages.run("export", Artifact.load(tiny), tmp_path / logits, options).path
        session, decoder = onnxruntime.InferenceSession(str(folder / "model.onnx")), Decoder(folder)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), dtype=np.int64)} | decoder.empty_cache(1)
        feeds |= {"position_ids": np.arange(len(ids))[None]} if "position_ids" in [v.name for v in session.get_inputs()] else {}
        found[logits] = session.run(["logits"], feeds)[0][0], decoder.feed(ids, keep=0)
        positions = session.get_outputs()[0].shape[1]
        assert positions == (1 if logits == "last" else session.get_inputs()[0].shape[1])
        decoder.reset()
        assert decoder.feed(ids).shape == (1, decoder.vocabulary)
    assert len(found["last"][0]) == 1 and np.array_equal(found["all"][0], found["all"][1])
    assert np.array_equal(found["last"][1], found["all"][1])
