"""Peak memory and time of the export stage, in a process of its own, against the size of the float16 checkpoint.

    python benchmarks/engines/export_memory.py [--shape llama] [--work out/engines]

Exports the packed folder that benchmarks/engines/compare.py builds (and builds it if it is not there): Llama-3.2-1B's shape, random
weights, 4 bits in blocks of 128, embedding and head at 8 bits. The stage writes the graph and proves it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engine_files import SHAPES, TITLES, checkpoint, once, ours, press

EXPORT = """
import json, sys, time
from pathlib import Path
def peak():  # of this process alone: ru_maxrss would begin with the parent's
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
begun = time.perf_counter()
from edgepress.exporters.stage import export
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.options import ExportOptions
imported, ready = peak(), time.perf_counter()
export(Artifact.load(Path(sys.argv[1])), Path(sys.argv[2]), ExportOptions())
print(json.dumps({"imports": imported, "peak": peak(), "imports_s": ready - begun, "export_s": time.perf_counter() - ready}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--work", type=Path, default=Path("out/engines"))
    options = parser.parse_args()
    folder = options.work / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    source = once(folder / "checkpoint", lambda out: checkpoint(SHAPES[options.shape], out))
    name, method, group, head, _ = ours(options.shape)[1]
    flags = ["--method", method, "--group-size", str(group), "--head-bits", str(head)]
    packed = once(folder / f"{name}-packed", lambda out: press("quantize", str(source), str(out), *flags))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-c", EXPORT, str(packed), out]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit("the export failed")
        found = json.loads(done.stdout.splitlines()[-1])
        written = sum(file.stat().st_size for file in Path(out).glob("model.onnx*"))
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{TITLES[options.shape]}: float16 checkpoint {whole / 1e6:,.0f} MB, model.onnx {written / 1e6:,.0f} MB")
    print(f"export: {found['export_s']:.0f} s, and {found['imports_s']:.0f} s of imports")
    print(
        f"peak RSS {found['peak'] / 1e6:,.0f} MB, {found['peak'] / whole:.2f} times the checkpoint; "
        f"of it imports {found['imports'] / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    main()
