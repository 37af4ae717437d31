"""The Python API: what the command line does, one function a command. The rooms below hold the work.

Options have the names of the flags (``--group-size 64`` is ``group_size=64``) and the same checks: a bad one raises OptionError.
Every error that edgepress raises on purpose is an EdgepressError (edgepress.pipeline.errors) whose text is one line.
"""

from __future__ import annotations

import edgepress.pipeline.search_path  # first: no module of the current folder may stand in for one imported below

# isort: split
import edgepress.pipeline.privacy

# isort: split
from pathlib import Path
from typing import TYPE_CHECKING

# Rooms of the same names as functions here are imported first: the import system then never puts a room in a function's place.
# A room is reached by its modules, as in ``from edgepress.pipeline.prune.stage import prune``.
import edgepress.pipeline.bench
import edgepress.pipeline.heal
import edgepress.pipeline.narrow
import edgepress.pipeline.page
import edgepress.pipeline.prune
import edgepress.pipeline.quantize
import edgepress.pipeline.trim
import edgepress.pipeline.tune
import edgepress.pipeline.verify  # noqa: F401
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.files import expanded as _expanded

if TYPE_CHECKING:
    from edgepress.pipeline.runtime.generate import TextModel
    from edgepress.pipeline.verify.checks import Check

__all__ = ["Artifact", "bench", "build", "export", "heal", "load", "narrow", "page", "prune", "quantize", "trim", "tune", "verify"]


def build(
    source: str | Path, out: str | Path | None = None, *, recipe: str | None = None, effort: str = "balanced", **options: object
) -> Artifact:
    """Run every stage of a recipe and return the ONNX artifact; a build that was interrupted goes on where it stopped.

    source: a folder with config.json and safetensors, a .gguf file, a hub id, or "reference" (the embedded model).
    out: default out/NAME. recipe: a YAML file or the name of a shipped one.
    effort: "quick", "balanced" or "best", for what neither the recipe nor ``options`` say.
    options: of any stage, instead of the recipe's, e.g. ``remove_count=2``, and bounds: ``max_memory="300MB"``, ``min_speed=30``.
    Raises InputError, OptionError, OutputError, ProofError (a stage failed its own check and left nothing behind).
    """
    from edgepress.pipeline import recipe as recipes
    from edgepress.pipeline.checkpoint.source import resolve

    name = recipe or recipes.recipe_for(str(source), options)
    bounds, rest = recipes.split_bounds(options)
    steps = recipes.plan(recipes.read(name), rest, effort)
    done = recipes.build(resolve(str(source)), _expanded(out) if out else recipes.default_out(str(source)), steps, bounds)
    return recipes.shipped_artifact(done)


def trim(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Keep some of the vocabulary (``keep_tokens``, ``keep_text``, ``languages``); returns the checkpoint with the others gone."""
    return _run("trim", source, out, options)


def prune(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Remove decoder blocks (``remove_count``, ``remove_fraction``, ``remove_layers`` or ``max_loss``); returns the checkpoint."""
    return _run("prune", source, out, options)


def heal(source: str | Path, out: str | Path, *, original: str | Path, **options: object) -> Artifact:
    """Recover what removal cost, by ``healer``, towards the ``original``; returns the checkpoint, unchanged if nothing helped."""
    return _run("heal", source, out, {**options, "original": original})


def narrow(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Take a share of the feed-forward channels (``remove_channels``) out of every block; returns the checkpoint, refitted."""
    return _run("narrow", source, out, options)


def quantize(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Quantize the matrices of the decoder blocks by ``method`` to ``bits`` in groups of ``group_size``; returns the checkpoint."""
    return _run("quantize", source, out, options)


def tune(source: str | Path, out: str | Path, *, original: str | Path, **options: object) -> Artifact:
    """Train scales, norms and biases towards the ``original``; returns the checkpoint, unchanged if nothing helped."""
    return _run("tune", source, out, {**options, "original": original})


def export(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Write the ONNX artifact and prove that it computes what the checkpoint computes. Raises ProofError when it does not."""
    return _run("export", source, out, options)


def bench(source: str | Path, out: str | Path | None = None, **options: object) -> Artifact:
    """Measure an ONNX artifact (or the OUT of a build) in fresh processes; returns the folder of report.json, .md and .html.

    out: default SOURCE-bench beside it. ``reference`` adds KL divergence (nats) and top-1 agreement with the original.
    """
    from edgepress.pipeline.artifact import bench_folder, onnx_folder

    folder = onnx_folder(_expanded(source))
    return _run("bench", folder, out or bench_folder(folder), options)


def page(source: str | Path, out: str | Path, **options: object) -> Artifact:
    """Write a folder of static files that chats with an artifact for browsers, or the OUT of a build with ``target="web"``."""
    from edgepress.pipeline.artifact import onnx_folder

    return _run("page", onnx_folder(_expanded(source)), out, options)


def verify(source: str | Path, *, original: str | Path | None = None, **options: object) -> list[Check]:
    """Check an ONNX artifact: complete, valid, running and, with ``original``, equal to its checkpoint; one Check each."""
    from edgepress.pipeline.artifact import onnx_folder
    from edgepress.pipeline.checkpoint.source import resolve
    from edgepress.pipeline.flags import make
    from edgepress.pipeline.options import VerifyOptions
    from edgepress.pipeline.verify.checks import verify as checks

    given = options if original is None else {**options, "original": resolve(str(original))}
    return list(checks(onnx_folder(_expanded(source)), make(VerifyOptions, given)))


def load(source: str | Path, *, threads: int = 0) -> TextModel:
    """An ONNX artifact (or the OUT of a build) ready to generate, on the CPU, without torch.

    threads: 0 leaves the choice to onnxruntime. ``load(folder).stream("Once upon a time", max_new_tokens=40)`` yields text.
    """
    from edgepress.pipeline.artifact import onnx_folder
    from edgepress.pipeline.runtime.generate import TextModel

    return TextModel(onnx_folder(_expanded(source)), threads)


def _run(name: str, source: str | Path, out: str | Path, options: dict[str, object]) -> Artifact:
    from edgepress.pipeline import stages
    from edgepress.pipeline.flags import make

    named = ("reference", "original", "calibration_model")
    models = {key: stages.source_of(str(options[key])).path for key in named if options.get(key)}
    settings = make(stages.STAGES[name].options, options | models)
    return stages.run(name, stages.source_of(str(source)), _expanded(out), settings)
