"""Recipes: which stages, in which order, with which options; checked whole before a weight is read, then built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from edgepress.models import RECIPES
from edgepress.models.config import layer_count_key
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.source import check_checkpoint, resolve
from edgepress.pipeline.errors import OptionError, OutputError
from edgepress.pipeline.files import MANIFEST, check_disk, folder_bytes, read_json
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import BenchOptions, bits_rules
from edgepress.pipeline.registry import look_up, suggestion
from edgepress.pipeline.runtime.targets import target
from edgepress.pipeline.stages import STAGES

log = logging.getLogger("edgepress")
Plan = list[tuple[str, Any]]
_AMOUNTS = {"remove_count", "remove_fraction", "max_loss", "remove_layers"}
OF_A_METHOD = ("method", "bits", "bits_for", "group_size", "symmetric", "act_order")


def read(name: str) -> dict[str, dict[str, Any]]:
    """A recipe as stage -> options, from a YAML file or by the name of a shipped one. Raises OptionError."""
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    file = Path(name).expanduser()
    if not file.is_file():
        if name not in shipped:
            known = ", ".join(shipped)
            raise OptionError(f"no recipe '{name}'{suggestion(name, shipped)}; give a YAML file or one of: {known}")
        file = shipped[name]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} is not valid YAML ({str(error).splitlines()[0]}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise OptionError(f"{file} must map each stage to its options, as in 'quantize: {{method: gptq}}'")
    if not content:
        raise OptionError(f"{file} names no stage; give at least one of: {', '.join(STAGES)}")
    return {str(stage): _beside(file, options or {}) for stage, options in content.items()}


def _beside(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A recipe travels with its texts: their paths are relative to it."""
    paths = {"calibration", "text", "other_text"}
    named = {str(key).replace("-", "_"): value for key, value in options.items()}
    return {key: str(file.parent / value) if key in paths and isinstance(value, str) else value for key, value in named.items()}


def plan(recipe: Mapping[str, Mapping[str, Any]], flags: Mapping[str, Any]) -> Plan:
    """Options of every stage: the recipe's, overridden by flags (each goes to every stage that has it).

    Raises OptionError for an unknown stage or option, a bad value, stages whose formats do not follow each other,
    or a flag that no stage of the recipe takes.
    """
    chosen: Plan = []
    unused = set(flags)
    format = "hf"
    for name, given in recipe.items():
        stage = look_up(STAGES, name, "stage")
        if format not in stage.takes:
            raise OptionError(
                f"{name} cannot follow in this recipe: it takes {' or '.join(stage.takes)}, and what comes before gives {format}"
            )
        format = stage.gives
        names = {item.name for item in dataclasses.fields(stage.options)}
        own = {key: value for key, value in flags.items() if key in names}
        unused -= set(own)
        if not _AMOUNTS.isdisjoint(own):  # ways to say what to remove exclude each other: a flag replaces them all
            given = {k: v for k, v in given.items() if k not in _AMOUNTS and not (k == "criterion" and "remove_layers" in own)}
        if type(count := given.get("remove_layers")) is int:  # the former spelling of a count
            raise OptionError(f"remove_layers takes indices, as [4, 5]; for a count write remove_count: {count}")
        if own.get("method", given.get("method")) != given.get("method"):  # another method's settings say nothing of this one
            given = {k: v for k, v in given.items() if k not in OF_A_METHOD}
        chosen.append((name, make(stage.options, {**given, **own}, f"option of {name}")))
    if unused:
        raise OptionError(f"no stage of this recipe ({', '.join(recipe)}) takes {min(unused).replace('_', '-')}")
    return chosen


def _bits(options: Any) -> list[int]:
    return [options.weight_bits, *(bits for _, bits in bits_rules(options.bits_for))]


def _check_inputs(source: Path, steps: Plan) -> None:
    """What the last stage would stumble over is found before the first begins. Raises TextError, OptionError."""
    from edgepress.pipeline.text.windows import context_length, proof_window, read_text, text_windows

    config = read_json(source / "config.json")
    for name, options in steps:
        if name == "quantize" and any(n == "export" for n, _ in steps) and 3 in _bits(options):
            raise OptionError("no onnxruntime operator carries 3-bit weights; give --bits 2, 4 or 8 to export")
        if name == "bench":
            target(options.target)
        if name == "prune":
            options.amount(config[layer_count_key(config)])
        for field in ("calibration", "text", "other_text"):
            if hasattr(options, field):
                read_text(getattr(options, field))
        if name == "export":
            text_windows(options.text, source, budget=proof_window(source), length=proof_window(source))
        if name == "bench":
            longest = max(options.lengths_within(context_length(source)))
            text_windows(options.text, source, budget=max(options.text_tokens, longest))


def _resolved(options: Any) -> Any:
    """Models that a recipe names may be anything that the source may be."""
    named = {name: getattr(options, name, None) for name in ("original", "reference")}
    return dataclasses.replace(options, **{name: resolve(str(value)) for name, value in named.items() if value is not None})


def build(source: Path, out: Path, steps: Plan) -> list[Artifact]:
    """Run a plan into ``out/01-...``, ``out/02-...``; a stage that is done already, and unchanged, is kept."""
    original = artifact = Artifact.load(source)
    steps = [(name, _resolved(options)) for name, options in steps]
    check_checkpoint(source, bool(getattr(steps[0][1], "trust_remote_code", False)), quantized=steps[0][0] == "export")
    _check_inputs(source, steps)
    folders = [out / f"{number:02}-{name}" for number, (name, _) in enumerate(steps, 1)]
    stale = [f for f in sorted(out.glob("[0-9][0-9]-*")) if (f / MANIFEST).is_file() and f not in folders]
    if stale:
        raise OutputError(f"{stale[0]} is of another recipe; delete it, or choose another output folder")
    missing = [STAGES[name].disk for (name, _), folder in zip(steps, folders, strict=True) if not (folder / MANIFEST).is_file()]
    check_disk(out, int(folder_bytes(source) * sum(missing)))
    done: list[Artifact] = []
    for (name, options), folder in zip(steps, folders, strict=True):
        if name == "bench":
            options = _beside_others(original, out, steps, done, options)
        if name == "heal":
            options = dataclasses.replace(options, original=options.original or original.path)
        artifact = stages.run(name, artifact, folder, options)
        done.append(artifact)
    return done


def _beside_others(original: Artifact, out: Path, steps: Plan, done: list[Artifact], options: BenchOptions) -> BenchOptions:
    """The bench options of a build: the original, the checkpoints in between, and the same model quantized without removal."""
    between = tuple(a.path for a in done if a.format in ("hf", "packed"))
    options = dataclasses.replace(options, reference=options.reference or original.path, stages=options.stages or between)
    removed = any(step.facts.get("removed_layers") for step in done[-1].steps)
    if not (options.baseline and removed):
        return options
    artifact = original
    kept = [(name, given) for name, given in steps if STAGES[name].gives in ("packed", "onnx")]
    log.info("baseline: the same without removal, to compare with (--no-baseline leaves it out)")
    level = next((step.facts["accuracy_level"] for step in reversed(done[-1].steps) if "accuracy_level" in step.facts), None)
    for number, (name, given) in enumerate(kept, 1):
        if level is not None and hasattr(given, "accuracy_level"):  # or the two would differ in more than their layers
            given = dataclasses.replace(
                given, accuracy_level=str(level), min_agreement=0.0, **({} if level else {"exact_layers": None})
            )
        artifact = stages.run(name, artifact, out / "baseline" / f"{number:02}-{name}", given)
    return dataclasses.replace(options, compare_with=(*options.compare_with, artifact.path))
