"""Can the benchmark be believed: one artifact against itself, and against the same with a quarter of its layers removed.

    python benchmarks/bench_of_bench.py [SRC] [--work out/bench-of-bench] [--repeats 7]

Prints every comparison. Expected: "no difference shown" for the artifact against itself, "faster" at decode and prefill for the one
with fewer layers. Nothing else should run meanwhile; what does run shows as wide intervals, not as wrong verdicts.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.source import resolve
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.report.model import read
from edgepress.pipeline.report.tables import COMPARISON_HEADER, comparison_rows
from edgepress.pipeline.report.text import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", nargs="?", default="reference", help="checkpoint (default: reference)")
    parser.add_argument("--work", type=Path, default=Path("out/bench-of-bench"))
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made = {}
    for name, prune in (("whole", {}), ("three-quarters", {"prune": {"remove_fraction": 0.25}})):
        steps = recipe.plan(prune | {"quantize": {"method": "rtn", "group_size": 64}, "export": {}}, {})
        made[name] = recipe.build(resolve(options.source), options.work / name, steps)[-1].path
    again = options.work / "whole-again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(made["whole"], again)
    bench = BenchOptions(compare_with=(again, made["three-quarters"]), repeats=options.repeats, text_tokens=1000)
    report = stages.run("bench", Artifact.load(made["whole"]), options.work / "bench", bench)
    print(table([COMPARISON_HEADER, *comparison_rows(read(report.path / "report.json").comparisons)]))


if __name__ == "__main__":
    main()
