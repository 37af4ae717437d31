"""The export stage: choose a graph, write the artifact folder, prove it."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir
from edgepress.exporters import architecture, fused, portable
from edgepress.exporters.configs import write_configs
from edgepress.exporters.graph.builder import Builder
from edgepress.exporters.graph.files import give_all_logits, rows_in_place, save, weight_bytes_per_token
from edgepress.exporters.graph.half_scales import keep_scales_in_half
from edgepress.exporters.graph.planes import keep_codes_in_planes
from edgepress.exporters.graph.web import WebBuilder, has_bytes
from edgepress.exporters.int8_cache import quantize_cache
from edgepress.exporters.node_layout import dtype_of, lay_out
from edgepress.exporters.proof import accuracy_level, parity
from edgepress.exporters.proof.reference import ReferenceLogits, reference_logits
from edgepress.models.rotary import grows, switches
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import parameters_left
from edgepress.pipeline.errors import ModelError, OptionError
from edgepress.pipeline.files import MANIFEST, JsonObject, folder_bytes
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.scores import Quality, mean_loss_of
from edgepress.pipeline.options import INT8, NODE, WEB, ExportOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.registry import require
from edgepress.pipeline.text.reading import read_text
from edgepress.pipeline.text.windows import same_tokens
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")


def export(source: Artifact, out: Path, options: ExportOptions) -> JsonObject:
    """Write ``model.onnx`` and all that runs it into ``out``; returns the facts for the manifest.

    Raises ProofError when the file does not compute what the checkpoint computes, OptionError when the exporter
    asked for cannot express the model.
    """
    require("onnxruntime")
    checkpoint = Checkpoint(source.path, options.trust_remote_code, options.original)
    read = checkpoint.remarks("export")
    if options.reference and not same_tokens(options.reference, source.path, read_text(options.text, options.text_key)[:2000]):
        raise OptionError(
            f"{options.reference} has a different tokenizer from {source.path}; give the checkpoint that it was made from"
        )
    written = draft(checkpoint, out, options)
    graph, exporter, obstacle, model = written.graph, written.exporter, written.obstacle, written.model
    is_fused, half = exporter == "fused", options.target == "cuda"
    changes = switches(checkpoint.config)
    if grows(checkpoint.config):
        context = checkpoint.config.max_position_embeddings
        log.info("export: the context ends at %d tokens, beyond which dynamic rotary frequencies change with every token", context)
    windows = parity.proof_windows(options.text, source.path, changes, options.text_key)
    with reference_logits(model, windows, out) as reference:
        exact = parity.prove(reference, out, graph, other_way(checkpoint, is_fused))
        loss = mean_loss_of(reference.windows, map(reference.logits, reference.windows))
        warn_unless_readable(loss, checkpoint.config.vocab_size, options.text)
        choice = accuracy_level.choose(reference, out, graph, options, lambda: _lost(reference, out, options, is_fused))
        kept = quantize_cache(reference, checkpoint, out, choice.proof or exact) if options.cache == INT8 else None
    if options.layout == NODE or options.target == WEB:
        lay_out(out, dtype_of(graph, half), reference.windows[0][:64])
    if half:
        log.info("export: float16 for CUDA, proven with onnxruntime's CPU kernels; bench --target cuda measures it on the GPU")
    _check_size(source, out)
    facts: JsonObject = read | {
        "source": source.identity(),
        "exporter": exporter,
        "target": options.target,
        "activations": "float16" if half else "int16" if has_bytes(graph.graph) else "float32",
        "proven_on": "CPUExecutionProvider",
        "batch": graph.metadata_props["edgepress.batch"],
        **choice.facts(),
        "parity": [asdict(proof) for proof in (exact, kept.proof if kept else choice.proof) if proof is not None],
        "parameters": parameters_left(checkpoint.meta_model(), checkpoint.silent),
        "weight_bytes_per_token": weight_bytes_per_token(graph),
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
    }
    if imported := checkpoint.weights.imported:
        log.info("export: already quantized (%s), so its integers are exported as they are", ", ".join(map(str, imported.values())))
        facts["imported"] = imported
    if kept:
        facts |= kept.facts()
    if changes:
        facts["rotary_switches"] = list(changes)
    return facts | ({"not_fused_because": obstacle} if obstacle else {})


def foresee(source: Path, options: ExportOptions, removed: int) -> None:
    """Raise OptionError for a cache that the graph of the model in ``source`` cannot have."""
    if options.cache == INT8:
        _check_cache(*choose_exporter(options.exporter, Checkpoint(source, options.trust_remote_code)))


def _check_cache(exporter: str, obstacle: str | None) -> None:
    if exporter != "fused":
        why = f" ({obstacle})" if obstacle else ""
        raise OptionError(f"--cache int8 is of the fused graph, and this model gets the portable one{why}; leave --cache out")


@dataclass(frozen=True)
class Draft:
    """A graph as it was written, by which exporter, why not by the fused one, and the model in torch to compare it with."""

    graph: ir.Model
    exporter: str
    obstacle: str | None
    model: PreTrainedModel


def draft(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> Draft:
    """Write the artifact into ``out``, not proven yet. Raises as ``export`` does."""
    if not architecture.attending_layers(checkpoint.config, checkpoint.silent):
        raise ModelError("no layer of this model has attention any more, so nothing would see the text; remove fewer parts")
    exporter, obstacle = choose_exporter(options.exporter, checkpoint)
    is_fused = exporter == "fused"
    if options.cache == INT8:
        _check_cache(exporter, obstacle)
    # A trace needs all weights at once; a comparison reads one matrix at a time.
    model = checkpoint.offloaded_model() if is_fused else checkpoint.model()
    half = options.target == "cuda"  # its GroupQueryAttention has no float32
    level = 0 if options.target != "cpu" or options.accuracy_level == "0" else 4  # int8 activations are for the CPU
    builder = WebBuilder() if options.target == WEB else Builder(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    graph = fused.build(checkpoint, level, builder) if is_fused else portable.build(checkpoint, model, level, builder)
    keep_scales_in_half(graph)
    keep_codes_in_planes(graph, builder.stored_bits)
    save(graph, out / "model.onnx")
    graph = rows_in_place(out / "model.onnx")
    if options.logits == "all":
        graph = give_all_logits(out / "model.onnx")
    write_configs(checkpoint, out, options.target, shared_cache=is_fused)
    return Draft(graph, exporter, obstacle, model)


def _check_size(source: Artifact, out: Path) -> None:
    """Warn where the artifact is larger than ``--max-size`` said; its manifest, still to be written, is the source's and more."""
    most = next((step.facts["max_bytes"] for step in reversed(source.steps) if "max_bytes" in step.facts), None)
    if most is None:
        return
    weighs = folder_bytes(out) + (source.path / MANIFEST).stat().st_size
    if weighs > most:
        log.warning(
            "warning: the artifact has %.2f MB, more than the %.2f MB of --max-size; give quantize a --max-size %.1fMB lower",
            weighs / 1e6, most / 1e6, math.ceil((weighs - most) / 1e5) / 10,
        )  # fmt: skip


def _lost(reference: ReferenceLogits, out: Path, options: ExportOptions, is_fused: bool) -> accuracy_level.Lost:
    """What the checkpoint has lost to the original, over the windows of the proof; nothing where no original is given."""
    if options.reference is None:
        return accuracy_level.Lost()
    original, quality = Checkpoint(options.reference, options.trust_remote_code), Quality()
    with reference_logits(original.offloaded_model() if is_fused else original.model(), reference.windows, out) as truth:
        for ids in progress(reference.windows, "the original's logits", "text"):
            quality.add(ids, reference.logits(ids), truth.logits(ids))
    return accuracy_level.Lost(quality.figures()["kl_mean"], quality.loss_change()[0])


def other_way(checkpoint: Checkpoint, is_fused: bool) -> str:
    """What may help where a graph does not compute what the checkpoint does: the other exporter, if it can take the model."""
    if is_fused:
        return "use --exporter portable"
    return "use --exporter fused" if architecture.obstacle(checkpoint) is None else "no exporter is left; choose another model"


def choose_exporter(requested: str, checkpoint: Checkpoint) -> tuple[str, str | None]:
    """The exporter to use, and why it is not the fused one.

    Raises OptionError when the fused one is requested and cannot express the model.
    """
    if requested == "portable":
        return "portable", None
    obstacle = architecture.obstacle(checkpoint)
    if obstacle is None:
        return "fused", None
    if requested == "fused":
        raise OptionError(f"the fused graph cannot express this model ({obstacle}); use --exporter portable")
    log.info("export: standard attention operators instead of the fused graph (%s)", obstacle)
    return "portable", obstacle
