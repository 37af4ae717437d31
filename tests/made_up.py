"""Reports made up for a test: figures of five rounds, without measuring anything."""

from __future__ import annotations

import math

import numpy as np
from edgepress.pipeline.report.comparison import comparisons
from edgepress.pipeline.report.model import Cpu, Environment, Figure, Original, Report, ReportFile, StageRow
from edgepress.pipeline.report.steps import Step


def a_report(name: str, *, removed: list[int], size: float, kl: float, decode: float, bits: int = 4) -> Report:
    """A report as bench makes it."""
    noise = np.array([1.0, 1.01, 0.99, 1.005, 0.995])
    options = {"method": "gptq", "bits": bits, "group_size": 64, "head_bits": 8, "symmetric": False}
    prune = {"influences": [0.5, 0.1, 0.02, 0.3], "removed_layers": removed, "layers": [4, 4 - len(removed)]}
    return Report(
        artifact=name,
        identity=name,
        run="one",
        environment=Environment(
            cpu=Cpu("a <chip>", ("avx2",)), cores=2, threads=2, provider="CPUExecutionProvider",
            system="Linux", python="3.11", versions={"onnxruntime": "1"}, date="now", command="edgepress bench a b",
        ),
        steps=(
            *([Step("prune", {}, prune)] if removed else []),
            Step("quantize", options, {"head": {"lm_head": 8}}),
            Step("export", {}, {"exporter": "fused", "accuracy_level": 4}),
        ),
        figures={
            "size.total_bytes": Figure.of("byte", [size]),
            "memory.peak_rss_bytes": Figure.of("byte", (1e8 * noise).tolist()),
            "speed.ttft_ms.32": Figure.of("millisecond", (3 * noise).tolist()),
            "speed.decode_tokens_per_s": Figure.of("token/second", (decode * noise * np.array([1, 1, 1.001, 1, 1])).tolist()),
            "speed.inter_token_ms": Figure.of("millisecond", (1000 / decode * np.repeat(noise, 10)).tolist()),
            "quality.kl_mean": Figure.of("nat", [kl]),
            "tasks.arc_easy.acc": Figure.of("1", [0.3], 0.02),
        },
        stages=(
            StageRow("original", 40_000_000, perplexity=20.0, tokens=100, kl_mean=0.0, top1_agreement=1.0),
            StageRow(
                "onnx", int(size), perplexity=20 * math.exp(kl), tokens=100, kl_mean=kl, top1_agreement=0.9,
                change_nats=kl, share=1.0,
            ),
        ),
        missing={"memory.gpu_bytes": "measured on the CPU"},
        failed={},
    )  # fmt: skip


def an_original(decode: list[float]) -> Original:
    """As plain transformers ran it, in as many rounds as there are decode rates."""
    rounds = len(decode)
    return Original(
        "bfloat16",
        {
            "load.warm_s": Figure.of("second", [0.2] * rounds),
            "memory.peak_rss_bytes": Figure.of("byte", [5e8] * rounds),
            "speed.ttft_ms.32": Figure.of("millisecond", [21.0] * rounds),
            "speed.decode_tokens_per_s": Figure.of("token/second", decode),
        },
    )


def content_of(*reports: Report) -> ReportFile:
    """As bench writes it."""
    return ReportFile(reports, comparisons(reports))


PRUNED = a_report("pruned", removed=[2], size=7e6, kl=0.06, decode=125)
WHOLE = a_report("whole", removed=[], size=8e6, kl=0.01, decode=100)
