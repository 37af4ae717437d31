"""Quality of each engine's own file: logits of the same windows, computed by the engine itself, against the original's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.runtime.decoder import Decoder
from engine_files import process


def quality(windows: list[np.ndarray], found: Path, truth: Path) -> dict[str, float]:
    """Perplexity, KL and top-1 agreement from two files of logits; mapped, for those of a large vocabulary are gigabytes."""
    scores = Quality()
    for ids, own, original in zip(windows, by_window(found, windows), by_window(truth, windows), strict=True):
        scores.add(ids, own, original)
    return dict(scores.figures())  # type: ignore[arg-type]


def by_window(file: Path, windows: list[np.ndarray]) -> list[np.ndarray]:
    """The logits of each window (tokens, vocabulary) in a file that ``save_logits`` wrote."""
    return np.split(np.load(file, mmap_mode="r"), np.cumsum([len(ids) for ids in windows])[:-1])


def save_logits(engine: dict[str, Any], windows: list[np.ndarray], out: Path, llama: str, threads: int) -> None:
    """Of every position of every window, float32 (positions of all, vocabulary).

    engine: its ``kind`` and ``file``; of kind llama ``exact``, of kind torch ``gguf_file``, ``gelu_noise``: see engine_process.py.
    """
    job: dict[str, Any] = {"windows": [ids.tolist() for ids in windows], "threads": threads, "out": str(out)}
    if engine["kind"] == "llama":
        process(llama, "llama_logits", job | {"file": engine["file"], "exact": engine.get("exact", False)})
    elif engine["kind"] == "torch":
        more = {key: engine[key] for key in ("gguf_file", "gelu_noise") if key in engine}
        process(sys.executable, "torch_logits", job | {"folder": engine["file"]} | more)
    else:
        first, file = 0, None
        for ids, logits in zip(windows, _onnx(engine, windows, threads), strict=True):
            if file is None:
                file = np.lib.format.open_memmap(out, "w+", np.float32, (sum(map(len, windows)), logits.shape[1]))
            file[first : first + len(ids)] = logits
            first += len(ids)


def _onnx(engine: dict[str, Any], windows: list[np.ndarray], threads: int) -> Iterator[np.ndarray]:
    folder = Path(engine["file"])
    if engine["kind"] == "ours":
        decoder = Decoder(folder, threads=threads)
        for ids in windows:
            decoder.reset()
            yield decoder.feed(ids, keep=0)
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    decoder_config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    nothing = np.zeros((1, decoder_config["num_key_value_heads"], 0, decoder_config["head_size"]), dtype=np.float32)
    for ids in windows:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
        feeds |= {one.name: nothing for one in session.get_inputs() if one.name.startswith("past_key_values.")}
        yield session.run(["logits"], feeds)[0][0]
