"""What `edgepress plan` expects of artifacts, beside what they turn out to be: size, speed, first token, memory, perplexity.

python benchmarks/predictions.py SRC SCRATCH --size 80MB --size 110MB [--method rtn] [--text FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgepress.models import EVALUATION_TEXT
from edgepress.pipeline import stages
from edgepress.pipeline.options import BenchOptions, ExportOptions, PlanOptions, QuantizeOptions
from edgepress.pipeline.plan.frontier import frontier
from edgepress.pipeline.report.model import read


def main() -> None:
    """One row an artifact, each figure as expected / measured and what the expectation is off by."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", action="append", required=True)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--text", type=Path, default=EVALUATION_TEXT)
    parser.add_argument("--text-tokens", type=int, default=4096)
    options = parser.parse_args()
    source = stages.source_of(options.source)
    print("| asked | MB | tokens/s | first token, ms | peak RSS, MB | perplexity |")
    print("| ---: | --- | --- | --- | --- | --- |")
    for size in options.size:
        line = frontier(source, PlanOptions(method=options.method, max_size=size))
        asked = line.asked
        assert asked is not None and asked.usage is not None
        folder = options.scratch / size
        packed = stages.run("quantize", source, folder / "packed", QuantizeOptions(method=options.method, max_size=size))
        shipped = stages.run("export", packed, folder / "onnx", ExportOptions(accuracy_level="4"))
        texts = {"text": options.text, "text_tokens": options.text_tokens}
        bench = BenchOptions(reference=source.path, original_speed=False, repeats=3, **texts)
        report = read(stages.run("bench", shipped, folder / "bench", bench).path / "report.json").first
        figures = {name: figure.median for name, figure in report.figures.items()}
        perplexities = report.perplexities
        growth = perplexities["onnx"] / perplexities["original"] - 1
        pairs = [
            (asked.size / 1e6, figures["size.total_bytes"] / 1e6, "{:.1f}"),
            (1 / asked.usage.decode_s, figures["speed.decode_tokens_per_s"], "{:.0f}"),
            (1000 * asked.usage.ttft_s, figures[f"speed.ttft_ms.{line.prompt}"], "{:.0f}"),
            ((asked.usage.memory or 0) / 1e6, figures["memory.peak_rss_bytes"] / 1e6, "{:.0f}"),
        ]
        cells = [f"{form.format(a)} / {form.format(b)} ({100 * (a / b - 1):+.1f} %)" for a, b, form in pairs]
        print(f"| {size} | {' | '.join(cells)} | {100 * asked.growth:+.1f} % / {100 * growth:+.1f} % |", flush=True)


if __name__ == "__main__":
    main()
