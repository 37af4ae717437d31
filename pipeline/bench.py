"""The bench stage: what the shipped files need and give, each speed sample from a process of its own."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline import report
from edgepress.pipeline.artifact import Artifact, files_below, folder_bytes, write_json
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.perplexity import Quality
from edgepress.pipeline.progress import progress
from edgepress.pipeline.runtime import Decoder
from edgepress.pipeline.source import check_checkpoint
from edgepress.pipeline.table import load, version
from edgepress.pipeline.tokens import beginning, context_length, load_tokenizer, text_windows

SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """One figure: all its raw samples in ``unit``."""

    unit: str
    values: list[float]

    def plain(self) -> dict[str, Any]:
        """For JSON; the median is derived here and nowhere else."""
        return {"unit": self.unit, "values": self.values, "median": float(np.median(self.values))}


def bench(source: Artifact, out: Path, options: BenchOptions) -> dict[str, Any]:
    """Write report.json and report.md about an artifact into ``out``; returns its medians for the manifest."""
    _check_references(options)
    missing: dict[str, str] = {}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "artifact": source.path.resolve().name,
        "steps": [{"stage": s.stage, "options": s.options, "facts": s.facts} for s in source.steps],
        "environment": environment(options),
        "missing": missing,
    }
    figures = size(source) | speed(source, options, missing)
    rows = quality(source, options, missing)
    shipped = rows[-1]["figures"]
    figures |= {f"quality.{name}": Measurement(*value) for name, value in shipped.items()}
    content["figures"] = {name: figure.plain() for name, figure in figures.items()}
    content["stages"] = [{"name": r["name"], "bytes": r["bytes"]} | {k: v[1][0] for k, v in r["figures"].items()} for r in rows]
    write_json(out / "report.json", content)
    (out / "report.md").write_text(report.markdown(content), encoding="utf-8")
    return {name: figure["median"] for name, figure in content["figures"].items()}


def _check_references(options: BenchOptions) -> None:
    """Before anything is measured: every checkpoint named is there and can be read."""
    if options.stages and options.reference is None:
        raise OptionError("--stages are measured against the original; give it with --reference")
    for folder in (options.reference, *options.stages):
        if folder is not None:
            check_checkpoint(Artifact.load(folder).path, options.trust_remote_code, quantized=True)


def size(source: Artifact) -> dict[str, Measurement]:
    """Bytes of the folder as it ships and of each file, and bits per weight of the model file."""
    found = {"size.total_bytes": Measurement("byte", [folder_bytes(source.path)])}
    for file in files_below(source.path):
        found[f"size.file_bytes.{file.name}"] = Measurement("byte", [file.stat().st_size])
    parameters = next((s.facts["parameters"] for s in reversed(source.steps) if "parameters" in s.facts), None)
    if parameters:
        stored = sum(p.stat().st_size for p in source.path.glob("model.onnx*"))
        found["size.bits_per_weight"] = Measurement("bit", [8 * stored / parameters[-1]])
    return found


def speed(source: Artifact, options: BenchOptions, missing: dict[str, str]) -> dict[str, Measurement]:
    """Load, prefill, decode and memory, one sample from each of ``repeats`` fresh processes."""
    room = context_length(source.path)
    lengths = [n for n in options.prompt_lengths if n <= room]
    for length in set(options.prompt_lengths) - set(lengths):
        missing[f"speed.prefill_tokens_per_s.{length}"] = f"the model's context is {room} tokens"
    new_tokens = options.new_tokens
    if not lengths:
        raise OptionError(f"no prompt length fits the context of {room} tokens; give shorter --prompt-lengths")
    if min(lengths) + new_tokens + 8 > room:
        raise OptionError(
            f"{min(lengths)} prompt and {new_tokens} new tokens exceed the context of {room}; give fewer --new-tokens"
        )
    # Fixed ids from the text, never sampled from the model under test.
    ids = np.concatenate(text_windows(options.text, source.path, budget=max(lengths), length=room))[: max(lengths)]
    job = {"ids": ids.tolist(), "prompt_lengths": lengths, "new_tokens": new_tokens, "threads": options.threads}
    samples = [_worker(source.path, job) for _ in progress(range(options.repeats), "speed", "process")]

    found = {
        "load.warm_s": Measurement("second", [s["load_s"] for s in samples]),
        "speed.decode_tokens_per_s": Measurement(
            "token/second", [1000 * len(s["inter_token_ms"]) / sum(s["inter_token_ms"]) for s in samples]
        ),
        "speed.inter_token_ms": Measurement("millisecond", [t for s in samples for t in s["inter_token_ms"]]),
    }
    for length in lengths:
        seconds = [s["prefill"][str(length)] for s in samples]
        found[f"speed.ttft_ms.{length}"] = Measurement("millisecond", [1000 * t for t in seconds])
        found[f"speed.prefill_tokens_per_s.{length}"] = Measurement("token/second", [length / t for t in seconds])
    for key, name in (("peak_rss_bytes", "memory.peak_rss_bytes"), ("pss_bytes", "memory.pss_bytes")):
        values = [s[key] for s in samples if key in s]
        if values:
            found[name] = Measurement("byte", values)
        else:
            missing[name] = f"{platform.system()} does not tell"
    return found


def _worker(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgepress-bench-") as scratch:
        file = Path(scratch) / "job.json"
        write_json(file, job)
        done = subprocess.run(
            [sys.executable, "-m", "edgepress.pipeline.worker", str(folder), str(file)], capture_output=True, text=True
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ProofError(f"the measuring process failed: {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def quality(source: Artifact, options: BenchOptions, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Rows original, stages in between, and the artifact last: perplexity, and KL and top-1 against the original.

    All read the same token ids; the artifact from its shipped files with the accuracy level that ships.
    """
    windows = text_windows(options.text, source.path, budget=options.text_tokens)
    text_bytes = _bytes_of(windows, source.path)
    if options.reference is None:
        missing["quality.kl_mean"] = missing["quality.top1_agreement"] = "no original was given (--reference)"
        return [_row("onnx", source.path, _score(_decoder_logits(source.path), None, windows), text_bytes)]

    load_model = load("edgepress.pipeline.checkpoint:load_model")  # the artifact alone needs no torch
    _same_tokens(options.reference, source.path, windows)
    original = _torch_logits(load_model(options.reference, options.trust_remote_code))
    rows = [_row("original", options.reference, _score(original, original, windows, "original"), text_bytes)]
    for folder in options.stages:
        stage = Artifact.load(folder)
        name = {"prune": "pruned", "quantize": "quantized"}.get(stage.steps[-1].stage, folder.name) if stage.steps else folder.name
        scores = _score(_torch_logits(load_model(folder, options.trust_remote_code)), original, windows, name)
        rows.append(_row(name, folder, scores, text_bytes))
    return [*rows, _row("onnx", source.path, _score(_decoder_logits(source.path), original, windows, "onnx"), text_bytes)]


Logits = Callable[[np.ndarray], np.ndarray]


def _torch_logits(model: Any) -> Logits:
    import torch

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
        return found

    return logits


def _decoder_logits(folder: Path) -> Logits:
    decoder = Decoder(folder)

    def logits(ids: np.ndarray) -> np.ndarray:
        decoder.reset()
        return decoder.feed(ids, keep=0)

    return logits


def _score(model: Logits, original: Logits | None, windows: list[np.ndarray], label: str = "onnx") -> Quality:
    quality = Quality()
    for ids in progress(windows, f"quality of {label}", "window"):
        scores = model(ids)
        quality.add(ids, scores, None if original is None else scores if original is model else original(ids))
    return quality


def _row(name: str, folder: Path, scores: Quality, text_bytes: int) -> dict[str, Any]:
    units = {
        "perplexity": "1",
        "bits_per_byte": "bit/byte",
        "kl_mean": "nat",
        "kl_p99": "nat",
        "top1_agreement": "1",
        "tokens": "token",
    }
    figures = scores.figures(text_bytes)
    return {
        "name": name,
        "bytes": sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".onnx", ".data")),
        "figures": {key: (units[key], [value]) for key, value in figures.items()},
    }


def _bytes_of(windows: list[np.ndarray], folder: Path) -> int:
    """UTF-8 bytes of the scored tokens: all but those that begin a window unscored."""
    tokenizer = load_tokenizer(folder)
    first = max(1, len(beginning(tokenizer)))
    texts: Iterator[str] = (tokenizer.decode(row[first:].tolist(), skip_special_tokens=False) for row in windows)
    return sum(len(text.encode()) for text in texts)


def _same_tokens(reference: Path, artifact: Path, windows: list[np.ndarray]) -> None:
    """Raise OptionError when the two read text differently: their distributions cannot be compared then."""
    text = load_tokenizer(artifact).decode(windows[0].tolist())[:2000]
    if load_tokenizer(reference).encode(text).ids != load_tokenizer(artifact).encode(text).ids:
        raise OptionError(f"{reference} has another tokenizer than {artifact}; give the checkpoint that it was made from")


def environment(options: BenchOptions) -> dict[str, Any]:
    """What the figures depend on besides the artifact."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["edgepress", *sys.argv[1:]]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": options.threads or "onnxruntime's default",
        "provider": "CPUExecutionProvider",
        "versions": {name: v for name in ("edgepress", "onnxruntime", "numpy", "torch", "transformers") if (v := version(name))},
    }


def _cpu() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return {"model": platform.processor() or platform.machine()}
    rows = dict(line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in rows.items()}
    flags = [f for f in values.get("flags", "").split() if f.startswith(("avx", "amx", "fma", "f16c"))]
    return {"model": values.get("model name", platform.machine()), "flags": flags}
