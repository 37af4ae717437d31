"""The folder as transformers.js wants it: graph and weights below onnx/, by names that say the bits, and a config that says so.

The weights lie there alone. ``model.onnx`` stays where everybody else looks for it and reads the same file, so one folder serves
onnxruntime, onnxruntime-genai, optimum, edgepress and, under node, transformers.js; and browsers, where graph/web.py wrote it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.files import save
from edgepress.exporters.graph.web import has_bytes
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import WEIGHTS_BELOW, read_json, write_json
from edgepress.pipeline.runtime.decoder import MODEL, Decoder

# What transformers.js calls a type of weights -> what it appends to a file's name (its DEFAULT_DTYPE_SUFFIX_MAPPING).
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16", "bnb4": "_bnb4"}


def lay_out(folder: Path, dtype: str, window: np.ndarray) -> None:
    """Move the weights of the artifact ``folder`` below onnx/, with a second graph beside them.

    dtype: a key of SUFFIXES. window: ids int64 (tokens,). Raises ProofError unless both graphs give the logits that there were.
    """
    truth = Decoder(folder).feed(window, keep=0)
    name = f"model{SUFFIXES[dtype]}.onnx"
    below, graph = folder / WEIGHTS_BELOW, ir.load(folder / MODEL)
    below.mkdir()
    (folder / f"{MODEL}.data").rename(below / f"{name}_data")
    _point(graph, f"{name}_data", below)
    save(graph, below / name)
    _point(graph, f"{WEIGHTS_BELOW}/{name}_data", folder)
    save(graph, folder / MODEL)
    _write_configs(folder, dtype, name)
    for file in (MODEL, f"{WEIGHTS_BELOW}/{name}"):
        if not np.array_equal(Decoder(folder, model=file).feed(window, keep=0), truth):
            raise ProofError(f"{file} does not compute what the graph did before it was laid out; leave --layout out")


def dtype_of(graph: ir.Model, half: bool) -> str:
    """What transformers.js calls the weights: by the fewest bits of a matrix."""
    if has_bytes(graph.graph):
        return "q8"
    bits = [node.attributes["bits"].as_int() for node in graph.graph if node.op_type == "MatMulNBits"]
    if not bits:
        if any(node.op_type == "MatMulBnb4" for node in graph.graph):
            return "bnb4"
        return "fp16" if half else "fp32"
    return ("q4f16" if half else "q4") if min(bits) < 8 or half else "q8"


def _point(graph: ir.Model, location: str, base: Path) -> None:
    """Let every weight be read from ``location``, relative to ``base``."""
    for value in graph.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "", base_dir=base
            )  # fmt: skip


def _write_configs(folder: Path, dtype: str, name: str) -> None:
    """Which file is the model's, that its weights are in one file beside it, and the chat template where it is looked for."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"transformers.js_config": {"dtype": dtype, "use_external_data_format": {name: 1}}})
    tokenizer, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if template.is_file() and tokenizer.is_file():
        write_json(tokenizer, {"chat_template": template.read_text(encoding="utf-8")} | read_json(tokenizer))
