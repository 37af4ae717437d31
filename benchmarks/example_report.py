"""The example report: the embedded model with 0, 10 and 25 % of its layers removed, in four formats, measured in turn.

    python benchmarks/example_report.py [--work out/example] [--docs docs/example] [--repeats 7]

Builds the twelve artifacts (kept in --work, so that a second run goes on where the first stopped), measures them in one
interleaved benchmark, and writes report.json, report.md and report.html into --docs. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from edgepress.models import REFERENCE
from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import BenchOptions

FORMATS = {
    "gptq-4-128": {"method": "gptq", "bits": 4, "group_size": 128},
    "gptq-4-32": {"method": "gptq", "bits": 4, "group_size": 32},
    "int8": {"method": "int8"},
    "nf4": {"method": "nf4"},
}
SHARES = (0.0, 0.1, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, default=Path("out/example"), help="folder for the artifacts (default: out/example)")
    parser.add_argument("--docs", type=Path, default=Path("docs/example"), help="folder for the report (default: docs/example)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0 leaves the choice to onnxruntime")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    artifacts = [pressed(options.work, name, share) for share in SHARES for name in FORMATS]
    bench = BenchOptions(
        reference=REFERENCE,
        compare_with=tuple(artifacts[1:]),
        prompt_lengths=(32, 128, 384),
        repeats=options.repeats,
        threads=options.threads,
    )
    report = stages.run("bench", Artifact.load(artifacts[0]), options.work / "bench", bench)
    options.docs.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.md", "report.html"):
        shutil.copyfile(report.path / name, options.docs / name)
        print(options.docs / name)


def pressed(work: Path, name: str, share: float) -> Path:
    """The folder of one artifact, built unless it is there."""
    wanted = {"prune": {"remove_fraction": share}} if share else {}
    steps = recipe.plan(wanted | {"quantize": FORMATS[name], "export": {}}, {})
    return recipe.build(REFERENCE, work / (f"{name}-less-{100 * share:.0f}" if share else name), steps)[-1].path


if __name__ == "__main__":
    main()
