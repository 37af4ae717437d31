"""What a browser makes of a model: tokens/s in Chromium by how activations are rounded, and what each costs.

Usage: PYTHONPATH=tests python benchmarks/browser.py MODEL SCRATCH [--threads 1 2] [--tokens 2048] [--only NAME ...]
(MODEL: a GGUF file or a checkpoint; needs Chromium, node, and `make test-consumers`' node_modules)

The rows are graphs of the same codes (8 bits, one scale a row): as `export --target web` writes them, activations as two bytes; as
one byte with one scale a token; as DynamicQuantizeLinear makes them, one scale for all tokens; float activations; and MatMulNBits,
which native onnxruntime runs. KL divergence is to float activations, over windows of 256 tokens, by native onnxruntime.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from consumers.programs import by_browser
from edgepress.exporters import fused
from edgepress.exporters.configs import write_configs
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import save
from edgepress.exporters.graph.web import WebBuilder
from edgepress.exporters.node_layout import lay_out
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.options import EVALUATION_TEXT, ImportOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.reading import KEY
from edgepress.pipeline.text.windows import text_windows

PROMPT, COUNT = "The old house stood at the end of the lane, and", 32
WINDOW = 256


class OneByte(WebBuilder):
    """Activations as one byte, one scale a token."""

    def _product(self, x: ir.Value, codes: ir.Value, zeros: ir.Value, name: str) -> ir.Value:
        if x not in self._bytes:
            self._bytes[x] = self._quantized(x)
        rounded, step, middle = self._bytes[x]
        integers = self.op("MatMulInteger", [rounded, codes, middle, zeros], name)
        floats = self.op("Cast", [integers], f"{name}.floats", to=ir.DataType.FLOAT)
        return self.op("Mul", [floats, step], f"{name}.product")

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ...]:
        whole, step = self._in_steps(x, 127)
        return self._unsigned(whole, x.name), step, self.constant("uint8.middle", np.array(128, np.uint8))


class OneScale(OneByte):
    """Activations as DynamicQuantizeLinear makes them."""

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ...]:
        self.op("DynamicQuantizeLinear", [x], f"{x.name}.quantized", [f"{x.name}.{part}" for part in ("uint8", "step", "zero")])
        return tuple(self.nodes[-1].outputs)


class Floats(WebBuilder):
    """Float activations: onnxruntime makes float weights of the codes when it loads them."""

    def _product(self, x: ir.Value, codes: ir.Value, zeros: ir.Value, name: str) -> ir.Value:
        floats = [self.op("Cast", [v], f"{name}.float{i}", to=ir.DataType.FLOAT) for i, v in enumerate((codes, zeros))]
        return self.op("MatMul", [x, self.op("Sub", floats, f"{name}.centred")], name)


class Blocks(WebBuilder):
    """MatMulNBits, as native onnxruntime runs it."""

    def linear(self, x: ir.Value, weight: PackedLinear, name: str, level: int, weight_name: str | None = None) -> ir.Value:
        """As Builder.linear, with codes of its own."""
        return Builder.linear(self, x, weight, name, level, f"{name}.blocks")


ROWS: dict[str, Callable[[], Builder]] = {
    "float activations": Floats,
    "two bytes (--target web)": WebBuilder,
    "one byte, one scale a token": OneByte,
    "one byte, one scale for all": OneScale,
    "MatMulNBits": Blocks,
}


def main() -> None:
    """Print one row a graph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=list(ROWS))
    args = parser.parse_args()
    source = stages.source_of(args.model)
    if source.format == "gguf":
        source = stages.run("import", source, args.scratch / "model", ImportOptions())
    rows8 = QuantizeOptions(method="rtn", bits=8, group_size=-1)
    packed = stages.run("quantize", source, args.scratch / "packed", rows8)
    windows = text_windows(EVALUATION_TEXT, packed.path, budget=args.tokens, length=WINDOW, key=KEY)
    heads = "  ".join(f"{f'{n} threads: tokens/s':>22} {'first, ms':>10}" for n in args.threads)
    print(f"{'activations':<30} {'KL':>8}  {heads}", flush=True)
    exact = Decoder(written(packed, args.scratch / "exact", Floats(), windows[0][:16]))
    for number, name in enumerate(args.only):
        folder, quality = written(packed, args.scratch / str(number), ROWS[name](), windows[0][:16]), Quality()
        decoder = Decoder(folder)
        for ids in windows:
            for each in (decoder, exact):
                each.reset()
            quality.add(ids, decoder.feed(ids, keep=0), exact.feed(ids, keep=0))
        del decoder
        rates = [measured(folder, args.scratch, threads) for threads in args.threads]
        cells = "  ".join(f"{rate:>22.1f} {first:>10.0f}" for rate, first in rates)
        print(f"{name:<30} {quality.figures()['kl_mean']:>8.2g}  {cells}", flush=True)
        shutil.rmtree(folder)


def written(packed: Artifact, folder: Path, builder: Builder, ids: np.ndarray) -> Path:
    """The artifact that a builder writes, laid out for transformers.js."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(packed.path, trust_remote_code=False)
    save(fused.build(checkpoint, 0, builder), folder / "model.onnx")
    write_configs(checkpoint, folder, "cpu", shared_cache=True)
    lay_out(folder, "q8", ids)
    return folder


def measured(folder: Path, scratch: Path, threads: int) -> tuple[float, float]:
    """Tokens/s of decoding and milliseconds to the first token after PROMPT, in a fresh Chromium; medians of three."""
    (answer,) = by_browser([{"folder": str(folder), "text": PROMPT, "count": COUNT, "threads": threads, "timed": 3}], scratch)
    return float(np.median(answer["rates"])), float(np.median(answer["firsts"]))


if __name__ == "__main__":
    main()
