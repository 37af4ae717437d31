"""Parity once more, of a finished artifact with a checkpoint at hand; nothing is written into the artifact's folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from edgepress.exporters.graph.files import save_at_levels
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import reference_logits
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.offloaded import offloaded_model
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.vocabulary import PAST_TENSE


def recheck(artifact: Artifact, original: Artifact, source: Artifact | None, windows: list[np.ndarray], trust: bool) -> str:
    """What was found, in one line.

    source: the checkpoint that was exported, where it is at hand: the artifact must equal it at float activations, and keep
    the share of most likely tokens that its export was held to as it ships. original: measured against, no limit applies.
    Raises ProofError when the artifact does not compute what its source computes.
    """
    said = []
    if source is not None:
        said.append(_proven(artifact, source, windows, trust))
    else:
        said.append(f"no proof: {original.path.name} is not the checkpoint that was exported, give that one for a proof")
    if source is None or source.path != original.path:
        since = [PAST_TENSE[s.stage] for s in artifact.steps[len(original.steps) :] if s.stage in PAST_TENSE]
        quality = _distance(original, artifact, windows, trust)
        found = quality.figures()
        changed = f", {' and '.join(since)} since" if since else ""
        said.append(
            f"from {original.path.name}{changed}: KL {found['kl_mean']:.3g}, same top token {100 * found['top1_agreement']:.1f} %"
        )
    return "; ".join(said)


def _distance(original: Artifact, artifact: Artifact, windows: list[np.ndarray], trust: bool) -> Quality:
    quality = Quality()
    with _scratch() as scratch, reference_logits(load_model(original.path, trust), windows, scratch) as wanted:
        for ids in windows:
            wanted.logits(ids)
        del wanted.model  # before the decoder takes memory
        decoder = Decoder(artifact.path)
        for ids in windows:
            decoder.reset()
            quality.add(ids, decoder.feed(ids, keep=0), wanted.logits(ids))
    return quality


def _proven(artifact: Artifact, source: Artifact, windows: list[np.ndarray], trust: bool) -> str:
    step = artifact.steps[-1]
    half = step.facts.get("activations") == "float16"
    load = offloaded_model if step.facts.get("exporter") == "fused" else load_model
    with _scratch() as scratch, reference_logits(load(source.path, trust), windows, scratch) as wanted:
        exact = parity.measure(wanted, lambda: at_level_0(artifact.path, scratch), 0)
        if found := parity.faults(exact, half):
            raise ProofError(
                f"not what {source.path.name} computes at float activations: {found}; "
                "export it again, or give the checkpoint that was exported"
            )
        within = f"logits within {exact.difference:.1g} of their spread over {exact.tokens} tokens"
        said = f"equals {source.path.name} at float activations ({within})"
        if not step.facts.get("accuracy_level"):
            return said
        shipped = parity.measure(wanted, lambda: Decoder(artifact.path), step.facts["accuracy_level"])
    share, limit = shipped.top1_agreement, step.options.get("min_agreement", 0.0)
    kept = f"{100 * share:.1f} % of the most likely tokens as it ships, KL {shipped.kl_mean:.2g}"
    if share < limit:
        raise ProofError(f"{said}, but keeps {kept} ({100 * limit:g} % is its --min-agreement); export with --accuracy-level 0")
    return f"{said}, keeps {kept}"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgepress-verify-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def at_level_0(folder: Path, scratch: Path, target: str = "cpu") -> Decoder:
    """The artifact with float activations: another graph over the same weights, in a folder of its own."""
    save_at_levels(folder / "model.onnx", scratch / "model.onnx")
    shutil.copyfile(folder / "genai_config.json", scratch / "genai_config.json")
    for data in folder.glob("model.onnx?*"):  # onnxruntime refuses links that lead out of the folder
        try:
            os.link(data, scratch / data.name)
        except OSError:  # another disk
            shutil.copyfile(data, scratch / data.name)
    return Decoder(scratch, target=target)
