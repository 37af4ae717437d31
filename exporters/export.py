"""The export stage: choose a graph, write the artifact folder, prove it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepress.exporters import architecture, fused, levels, older, parity, portable
from edgepress.exporters.expected import expected
from edgepress.exporters.graph import rows_in_place, save, weight_bytes_per_token
from edgepress.exporters.weights import Weights
from edgepress.pipeline.artifact import Artifact, folder_bytes, write_json
from edgepress.pipeline.checkpoint import load_model, meta_model, read_config
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import ExportOptions
from edgepress.pipeline.runtime import end_tokens
from edgepress.pipeline.streamed import streamed_model
from edgepress.pipeline.table import require
from edgepress.pipeline.tokens import context_length, load_tokenizer
from transformers import PreTrainedConfig

log = logging.getLogger("edgepress")
# As GenAI's model builder writes them.
_GENAI_PROVIDERS: dict[str, list[dict[str, dict[str, str]]]] = {
    "cpu": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
}


def export(source: Artifact, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write ``model.onnx`` and all that runs it into ``out``; returns the facts for the manifest.

    Raises ProofError when the file does not compute what the checkpoint computes, OptionError when the exporter
    asked for cannot express the model.
    """
    require("onnxruntime")
    config = read_config(source.path, options.trust_remote_code)
    weights = Weights(source.path, options.original)
    exporter, reason = choose(options.exporter, config, weights)
    load = streamed_model if exporter == "fused" else load_model  # a trace needs all weights at once, a comparison does not
    model = load(source.path, options.trust_remote_code, options.original)
    half = options.target == "cuda"  # its GroupQueryAttention knows no float32, and int8 activations are the CPU's
    level = 0 if half or options.accuracy_level == "0" else 4
    graph = fused.build(config, weights, level, half) if exporter == "fused" else portable.build(model, weights, level, half)
    save(graph, out / "model.onnx")
    graph = rows_in_place(out / "model.onnx")
    older.write_configs(source.path, out)
    write_json(out / "genai_config.json", genai_config(config, source.path, options.target, shared=exporter == "fused"))

    windows = parity.proof_windows(options.text, source.path)
    with expected(model, windows, out) as wanted:
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


def genai_config(config: PreTrainedConfig, folder: Path, target: str, *, shared: bool) -> dict[str, Any]:
    """What onnxruntime-genai needs to run the folder; its key names are GenAI's."""
    ends = sorted(end_tokens(folder))
    context = int(getattr(config, "max_position_embeddings", 0) or context_length(folder))
    bos = config.bos_token_id if config.bos_token_id is not None else (load_tokenizer(folder).encode("a").ids or [0])[0]
    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else (ends or [0])[0]
    return {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": bos,
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": _GENAI_PROVIDERS[target]},
                "filename": "model.onnx",
                "head_size": architecture.head_size(config),
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": shared},
    }
