"""The report: figures that agree with an independent computation, and names that others can rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.files import read_json
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.options import BenchOptions, ExportOptions, QuantizeOptions
from edgepress.pipeline.text.windows import text_windows
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def exported(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A float export: no loss by quantization, so every figure has an exact counterpart in torch."""
    folder = tmp_path_factory.mktemp("bench")
    packed = stages.run("quantize", Artifact.load(tiny), folder / "packed", QuantizeOptions(method="none"))
    return stages.run("export", packed, folder / "onnx", ExportOptions(text=text))


@pytest.fixture(scope="module")
def report(exported: Artifact, tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = {"prompt_lengths": (8, 300), "new_tokens": 5, "repeats": 2}
    # one thread: several of torch would have to be alone on the machine
    options = BenchOptions(text=text, text_tokens=1000, reference=tiny, threads=1, **lengths)
    return stages.run("bench", exported, tmp_path_factory.mktemp("report") / "bench", options).path


def test_perplexity_of_a_float_export_is_transformers_own(report: Path, tiny: Path, text: Path) -> None:
    """Computed here from the loss that transformers itself returns, window by window."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    nats, count = 0.0, 0
    for row in text_windows(text, tiny, budget=1000):
        ids = torch.from_numpy(row)[None]
        with torch.inference_mode():
            nats += float(model(ids, labels=ids).loss) * (len(row) - 1)
        count += len(row) - 1
    assert count == 1000  # every token of the text is scored once: BOS is none of them
    figures = read_json(report / "report.json")["figures"]
    assert figures["quality.perplexity"]["median"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert figures["quality.kl_mean"]["median"] == pytest.approx(0, abs=1e-6)
    assert figures["quality.top1_agreement"]["median"] == 1


def test_figures_have_units_raw_samples_and_reasons(report: Path) -> None:
    """Flat names, never null; what could not be measured is absent, with its reason."""
    content = read_json(report / "report.json")
    figures = content["figures"]
    for name in (
        "size.total_bytes", "load.warm_s", "memory.peak_rss_bytes", "speed.ttft_ms.8", "speed.prefill_tokens_per_s.8",
        "speed.decode_tokens_per_s", "speed.inter_token_ms", "quality.perplexity", "quality.bits_per_byte",
    ):  # fmt: skip
        figure = figures[name]
        assert figure["unit"] and figure["values"] and figure["median"] == float(np.median(figure["values"]))
    assert len(figures["load.warm_s"]["values"]) == 2 and len(figures["speed.inter_token_ms"]["values"]) == 10
    assert "speed.ttft_ms.300" not in figures and "256" in content["missing"]["speed.prefill_tokens_per_s.300"]
    for name in ("load.cold_s", "memory.peak_pss_bytes", "memory.gpu_bytes", "speed.bandwidth_fraction"):
        assert (name in figures) != bool(content["missing"].get(name)), name
    assert content["missing"]["memory.gpu_bytes"] == "measured on the CPU"
    assert figures["quality.greedy_match_tokens"]["values"] == [32] * len(figures["quality.greedy_match_tokens"]["values"])
    assert 32 <= figures["size.bits_per_weight"]["median"] < 40  # float32, without a prune stage
    assert figures["speed.inter_token_ms"]["unit"] == "millisecond" and content["environment"]["cpu"]["model"]
    assert "null" not in json.dumps(content)
    assert (report / "report.md").read_text().count("|") > 20


def test_the_original_is_measured_beside(report: Path) -> None:
    """By plain transformers, in a process that holds torch, in as many rounds; in the table and in the first line."""
    content = read_json(report / "report.json")
    original, figures = content["original"], content["original"]["figures"]
    assert original["dtype"] == "float32" and "original" not in content["missing"]
    assert {"load.warm_s", "memory.peak_rss_bytes", "speed.ttft_ms.8", "speed.decode_tokens_per_s"} <= figures.keys()
    assert all(len(figure["values"]) == 2 for figure in figures.values())
    assert figures["memory.peak_rss_bytes"]["median"] > 2e8  # which the artifact's has not
    assert content["figures"]["memory.peak_rss_bytes"]["median"] < 2e8
    assert content["figures"]["quality.kl_mean"]["standard_error"] < 1e-6
    page = (report / "report.md").read_text()
    assert "| original (torch, float32) |" in page and " the original under transformers " in page.splitlines()[2]


def test_kl_of_a_distribution_with_itself_is_zero_and_grows_with_noise() -> None:
    random = np.random.default_rng(0)
    ids, logits = random.integers(0, 50, 30), random.normal(size=(30, 50)).astype(np.float32)
    values = []
    for noise in (0, 0.1, 1):
        quality = Quality()
        quality.add(ids, logits + noise * random.normal(size=logits.shape).astype(np.float32), logits)
        values.append(quality.figures()["kl_mean"])
    assert values[0] == 0 and 0 < values[1] < values[2]


def test_bench_without_an_original_says_what_is_missing(exported: Artifact, text: Path, call: Callable, tmp_path: Path) -> None:
    result = call(
        "bench", exported.path, "--text", text, "--text-tokens", 300, "--out", tmp_path / "b",
        "--repeats", 1, "--prompt-lengths", 8, "--new-tokens", 3,
    )  # fmt: skip
    assert result.code == 0 and "perplexity" in result.out
    missing = read_json(tmp_path / "b" / "report.json")["missing"]
    assert "--reference" in missing["quality.kl_mean"] and "--reference" in missing["original"]
