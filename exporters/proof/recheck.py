"""Parity once more, of a finished artifact with a checkpoint at hand; nothing is written into the artifact's folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from edgepress.exporters.graph.files import save_variant
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import reference_logits
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import graph_files
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.vocabulary import PAST_TENSE

SLACK = 1.25  # int8 kernels of another processor round differently


def recheck(
    artifact: Artifact, original: Artifact, source: Artifact | None, windows: list[np.ndarray], trust_remote_code: bool
) -> str:
    """The outcome in one line.

    source: the checkpoint that was exported, where it is at hand: the artifact must equal it at float activations, and as
    it ships add no more KL divergence than its export allowed. original: measured against, no limit applies.
    Raises ProofError when the artifact does not compute what its source computes.
    """
    outcomes = []
    if source is not None:
        outcomes.append(_proven(artifact, Checkpoint(source.path, trust_remote_code), windows))
    else:
        outcomes.append(f"no proof: {original.path.name} is not the checkpoint that was exported, give that one for a proof")
    if source is None or source.path != original.path:
        done = [PAST_TENSE[step.stage] for step in artifact.steps[len(original.steps) :] if step.stage in PAST_TENSE]
        since = f", {' and '.join(done)} since" if done else ""
        figures = _distance(Checkpoint(original.path, trust_remote_code), artifact, windows).figures()
        outcomes.append(
            f"from {original.path.name}{since}: KL {figures['kl_mean']:.3g}, same top token {100 * figures['top1_agreement']:.1f} %"
        )
    return "; ".join(outcomes)


def _distance(original: Checkpoint, artifact: Artifact, windows: list[np.ndarray]) -> Quality:
    quality = Quality()
    with _scratch() as scratch, reference_logits(original.model(), windows, scratch) as reference:
        for ids in windows:
            reference.logits(ids)
        del reference.model  # before the decoder takes memory
        decoder = Decoder(artifact.path)
        for ids in windows:
            decoder.reset()
            quality.add(ids, decoder.feed(ids, keep=0), reference.logits(ids))
    return quality


def _proven(artifact: Artifact, source: Checkpoint, windows: list[np.ndarray]) -> str:
    step, name = artifact.steps[-1], source.path.name
    half = step.facts.get("activations") in ("float16", "int16")
    load = source.offloaded_model if step.facts.get("exporter") == "fused" else source.model
    with _scratch() as scratch, reference_logits(load(), windows, scratch) as reference:
        exact = parity.measure(reference, lambda: at_level_0(artifact.path, scratch), 0)
        if reasons := parity.faults(exact, half):
            raise ProofError(
                f"differs from {name} at float activations: {reasons}; export it again, or give the checkpoint that was exported"
            )
        proof = (
            f"equals {name} at float activations "
            f"(logits within {exact.difference:.1g} standard deviations over {exact.tokens} tokens)"
        )
        level = step.facts.get("accuracy_level") or 0
        if not level and "cache" not in step.facts:
            return proof
        shipped = parity.measure(reference, lambda: Decoder(artifact.path), level)
    limit = step.facts.get("max_added_kl")
    added = f"KL {shipped.kl_mean:.2g} as it ships, {100 * shipped.top1_agreement:.1f} % of the most likely tokens the same"
    if limit is not None and shipped.kl_mean > SLACK * limit:
        raise ProofError(
            f"{proof}, but adds {added} (its export allowed KL {limit:.2g}); export with --accuracy-level 0 and a float cache"
        )
    return f"{proof}, adds {added}"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgepress-verify-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def at_level_0(folder: Path, scratch: Path, target: str = "cpu") -> Decoder:
    """The artifact with float activations and a float cache: another graph over the same weights, in a folder of its own."""
    save_variant(folder / "model.onnx", scratch / "model.onnx", float_cache=True)
    shutil.copyfile(folder / "genai_config.json", scratch / "genai_config.json")
    for data in graph_files(folder):  # onnxruntime refuses links that lead out of the folder
        place = scratch / data.relative_to(folder)
        if place.exists():
            continue
        place.parent.mkdir(exist_ok=True)
        try:
            os.link(data, place)
        except OSError:  # another disk
            shutil.copyfile(data, place)
    return Decoder(scratch, target=target)
