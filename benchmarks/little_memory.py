"""The whole chain on a model that does not fit into memory: minutes and peak of every stage, with and without ``--memory``.

    python benchmarks/little_memory.py MODEL --memory 1.2GB [--plain] [--limit 6] [--work out/little-memory]
        [--prune "--criterion bi --remove-count 3"] [--heal ""] [--quantize "--bits 4"] [--export ""] [--bench "--text-tokens 1024"]

MODEL: what any command takes, or a shape of gptq_cost.py (random weights of that size, written first). Stages run one after the
other, each in a process of its own; a stage given as "no" is left out, and the next reads what the one before left. --plain: run
each without --memory, too, and say whether both wrote the same weights. Memory is the proportional set size (PSS) of the whole
process tree, sampled every 250 ms, at its peak; "allocated" is what of it is no file's. --limit: GB that a process may allocate at
most (RLIMIT_DATA: the kernel refuses what goes beyond, mapped files aside).
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from edgepress.pipeline.files import sha256
from edgepress.pipeline.stages import source_of
from gptq_cost import SHAPES, measured, model

STAGES = {
    "prune": "--criterion bi --remove-count 3 --calibration-tokens 4096",
    "heal": "--calibration-tokens 4096",
    "quantize": "--bits 4 --calibration-tokens 4096",
    "export": "",
    "bench": "--text-tokens 1024 --repeats 1 --prompt-lengths 64 --new-tokens 16 --no-original-speed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--work", type=Path, default=Path("out/little-memory"))
    for name, flags in STAGES.items():
        parser.add_argument(f"--{name}", default=flags)
    options = parser.parse_args()
    work = options.work.resolve()  # the processes stand elsewhere
    work.mkdir(parents=True, exist_ok=True)
    source = model(work / options.model, options.model) if options.model in SHAPES else source_of(options.model).path
    print("| stage | memory | minutes | peak, GB | allocated, GB | weights |\n| --- | --- | ---: | ---: | ---: | --- |")
    former = source
    for name in STAGES:
        flags = getattr(options, name)
        if flags == "no":
            continue
        written: list[dict[str, str]] = []
        for memory in (None, options.memory) if options.plain else (options.memory,):
            out = work / f"{name}{'' if memory else '-plain'}"
            for left in (out, out.with_name(f".{out.name}.gptq")):
                shutil.rmtree(left, ignore_errors=True)
            command = [sys.executable, "-m", "edgepress.pipeline.cli", name, str(former)]
            command += ["--out", str(out), "--reference", str(source)] if name == "bench" else [str(out)]
            command += ["--original", str(source)] if name == "heal" else []
            command += [*shlex.split(flags), *(["--memory", memory] if memory else [])]
            wall, _, peak, allocated = measured(command, work, options.limit)
            written.append({file.name: sha256(file) for file in out.iterdir() if file.suffix in (".safetensors", ".data")})
            same = "" if len(written) < 2 else "the same" if written[0] == written[1] else "others"
            print(
                f"| {name} | {memory or 'as it needs'} | {wall / 60:.1f} | {peak / 1e9:.2f} | {allocated / 1e9:.2f} | {same} |",
                flush=True,
            )
        former = out


if __name__ == "__main__":
    main()
