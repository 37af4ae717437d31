"""The export stage: choose a graph, write the artifact folder, prove it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepress.exporters import architecture, fused, portable
from edgepress.exporters import configs as older
from edgepress.exporters.configs import genai_config
from edgepress.exporters.graph.files import rows_in_place, save, weight_bytes_per_token
from edgepress.exporters.proof import accuracy_level as levels
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import reference_logits
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model, meta_model, read_config
from edgepress.pipeline.checkpoint.offloaded import offloaded_model
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import folder_bytes, write_json
from edgepress.pipeline.options import ExportOptions
from edgepress.pipeline.registry import require
from transformers import PreTrainedConfig

log = logging.getLogger("edgepress")


def export(source: Artifact, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write ``model.onnx`` and all that runs it into ``out``; returns the facts for the manifest.

    Raises ProofError when the file does not compute what the checkpoint computes, OptionError when the exporter
    asked for cannot express the model.
    """
    require("onnxruntime")
    config = read_config(source.path, options.trust_remote_code)
    weights = Weights(source.path, options.original)
    exporter, reason = choose(options.exporter, config, weights)
    load = offloaded_model if exporter == "fused" else load_model  # a trace needs all weights at once, a comparison does not
    model = load(source.path, options.trust_remote_code, options.original)
    half = options.target == "cuda"  # its GroupQueryAttention knows no float32, and int8 activations are the CPU's
    level = 0 if half or options.accuracy_level == "0" else 4
    graph = fused.build(config, weights, level, half) if exporter == "fused" else portable.build(model, weights, level, half)
    save(graph, out / "model.onnx")
    graph = rows_in_place(out / "model.onnx")
    older.write_configs(source.path, out)
    write_json(out / "genai_config.json", genai_config(config, source.path, options.target, shared=exporter == "fused"))

    windows = parity.proof_windows(options.text, source.path)
    with reference_logits(model, windows, out) as wanted:
        exact = parity.prove(wanted, out, graph)
        chosen, shipped = levels.choose(wanted, out, graph, options)
    if half:
        log.info("export: float16 for CUDA, proven with onnxruntime's CPU kernels; it has not run on a GPU")
    facts = {
        "source": source.identity(),
        "exporter": exporter,
        "target": options.target,
        "activations": "float16" if half else "float32",
        "proven_on": "CPUExecutionProvider",
        "batch": graph.metadata_props["edgepress.batch"],
        **chosen,
        "parity": [asdict(proof) for proof in (exact, *shipped)],
        "parameters": meta_model(source.path, options.trust_remote_code).num_parameters(),
        "weight_bytes_per_token": weight_bytes_per_token(graph),
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
    }
    if weights.imported:
        log.info("export: quantized by another (%s), its integers taken over", ", ".join(map(str, weights.imported.values())))
        facts["imported"] = weights.imported
    return facts | ({"not_fused_because": reason} if reason else {})


def choose(wanted: str, config: PreTrainedConfig, weights: Weights) -> tuple[str, str | None]:
    """The exporter to use, and why it is not the fused one. Raises OptionError when fused was asked for and cannot be had."""
    if wanted == "portable":
        return "portable", None
    reason = architecture.obstacle(config, weights)
    if reason is None:
        return "fused", None
    if wanted == "fused":
        raise OptionError(f"the fused graph cannot express this model ({reason}); use --exporter portable")
    log.info("export: standard attention operators instead of the fused graph (%s)", reason)
    return "portable", reason
