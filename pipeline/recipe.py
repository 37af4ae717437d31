"""Recipes: which stages, in which order, with which options; checked whole before a weight is read, then built."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from edgepress.models import RECIPES
from edgepress.models.pruned_config import layer_count_key
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.effort import DEFAULT, settings
from edgepress.pipeline.errors import OptionError, OutputError
from edgepress.pipeline.expectation import Expectation, expect, matmul_rate
from edgepress.pipeline.files import MANIFEST, JsonObject, check_disk, folder_bytes, read_json, write_json
from edgepress.pipeline.flags import Options, make
from edgepress.pipeline.machine import peak_memory
from edgepress.pipeline.options import (
    BenchOptions,
    ExportOptions,
    HealOptions,
    ImportOptions,
    PruneOptions,
    QuantizeOptions,
    bits_rules,
)
from edgepress.pipeline.registry import look_up, suggestion
from edgepress.pipeline.runtime.targets import target
from edgepress.pipeline.stages import STAGES

log = logging.getLogger("edgepress")
Recipe = dict[str, dict[str, object]]  # stage -> option -> value, as YAML gives them
Plan = list[tuple[str, Options]]
_AMOUNTS = {"remove_count", "remove_fraction", "max_loss", "remove_layers"}
_TEXTS = ("calibration", "text", "other_text")
# What another quantization method need not understand.
METHOD_OPTIONS = ("method", "bits", "bits_for", "group_size", "symmetric", "act_order", "max_growth")


def read(name: str) -> Recipe:
    """A recipe from a YAML file or by the name of a shipped one. Raises OptionError."""
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
    return {str(stage): _resolve_texts(file, options or {}) for stage, options in content.items()}


def _resolve_texts(file: Path, options: dict[object, object]) -> dict[str, object]:
    """A recipe travels with its texts: their paths are relative to it."""
    named = {str(key).replace("-", "_"): value for key, value in options.items()}
    return {key: str(file.parent / value) if key in _TEXTS and isinstance(value, str) else value for key, value in named.items()}


def plan(recipe: Mapping[str, Mapping[str, object]], flags: Mapping[str, object], effort: str = DEFAULT) -> Plan:
    """Options of every stage: the recipe's, overridden by flags (each goes to every stage that has it), the rest by ``effort``.

    Raises OptionError for an unknown stage or option, a bad value, stages whose formats do not follow each other,
    or a flag that no stage of the recipe takes.
    """
    planned: Plan = []
    unused = set(flags)
    format = "hf"
    for name, given in recipe.items():
        stage = look_up(STAGES, name, "stage")
        if format not in stage.takes:
            raise OptionError(
                f"{name} cannot come here: it takes {' or '.join(stage.takes)}, "
                f"but {'the previous stage produces' if planned else 'the source is'} {format}"
            )
        format = stage.gives
        names = {item.name for item in dataclasses.fields(stage.options)}
        overrides = {key: value for key, value in flags.items() if key in names}
        unused -= set(overrides)
        options = {**_not_replaced(given, overrides), **overrides}
        options |= settings(effort, name, options)
        planned.append((name, make(stage.options, options, f"option of {name}")))
    if unused:
        raise OptionError(f"no stage of this recipe ({', '.join(recipe)}) takes {min(unused).replace('_', '-')}")
    return planned


def _not_replaced(given: Mapping[str, object], flags: Mapping[str, object]) -> dict[str, object]:
    """The recipe's options of one stage, without those that a flag makes meaningless."""
    kept = dict(given)
    if str(count := kept.get("remove_layers", "")).isdecimal():  # the former spelling of a count
        raise OptionError(f"remove_layers takes indices, as [4, 5]; for a count write remove_count: {count}")
    if not _AMOUNTS.isdisjoint(flags):  # ways to say what to remove exclude each other: a flag replaces them all
        kept = {k: v for k, v in kept.items() if k not in _AMOUNTS and not (k == "criterion" and "remove_layers" in flags)}
    if flags.get("method", kept.get("method")) != kept.get("method"):  # the settings of one method mean nothing to another
        kept = {k: v for k, v in kept.items() if k not in METHOD_OPTIONS}
    if not {"bits", "bits_for"}.isdisjoint(flags):  # then nothing is left to choose
        kept.pop("max_growth", None)
    return kept


def _check_inputs(source: Path, steps: Plan) -> None:
    """What the last stage would stumble over is found before the first begins. Raises TextError, OptionError."""
    from edgepress.pipeline.text.windows import context_length, proof_window, read_text, text_windows  # not needed for --help

    config = read_json(source / "config.json")
    for _, options in steps:
        for name in _TEXTS:
            if isinstance(text := getattr(options, name, None), Path):
                read_text(text)
        if isinstance(options, PruneOptions):
            options.amount(config[layer_count_key(config)])
        if isinstance(options, QuantizeOptions) and "export" in dict(steps) and 3 in _bits(options):
            raise OptionError("no onnxruntime operator carries 3-bit weights; give --bits 2, 4 or 8 to export")
        if isinstance(options, ExportOptions):
            text_windows(options.text, source, budget=proof_window(source), length=proof_window(source))
        if isinstance(options, BenchOptions):
            target(options.target)
            longest = max(options.lengths_within(context_length(source)))
            text_windows(options.text, source, budget=max(options.text_tokens, longest))


def _bits(options: QuantizeOptions) -> list[int]:
    return [options.weight_bits, *(bits for _, bits in bits_rules(options.bits_for))]


def _resolve_models(options: Options) -> Options:
    """Models that a recipe names may be anything that the source may be."""
    named = {name: getattr(options, name, None) for name in ("original", "reference")}
    return dataclasses.replace(
        options, **{name: stages.source_of(str(value)).path for name, value in named.items() if value is not None}
    )


def recipe_for(source: str) -> str:
    """The name of the shipped recipe that a source is built by where none is given."""
    return "reference" if source == "reference" else "default"


def shipped_artifact(done: Sequence[Artifact]) -> Artifact:
    """What a build ships: the last ONNX artifact of its stages, else what the last stage wrote."""
    return next((artifact for artifact in reversed(done) if artifact.format == "onnx"), done[-1])


def build(source: Path, out: Path, steps: Plan) -> list[Artifact]:
    """Run a plan into ``out/01-...``, ``out/02-...``; a stage that is done already, and unchanged, is kept.

    What it was expected to take and what it took stands in ``out/build.json``.
    """
    begun = time.monotonic()
    original = Artifact.load(source)
    if original.format == "gguf":
        original = stages.run("import", original, out / "00-import", ImportOptions())
        source = original.path
    artifact = original
    steps = [(name, _resolve_models(options)) for name, options in steps]
    check_checkpoint(source, bool(getattr(steps[0][1], "trust_remote_code", False)), quantized=steps[0][0] == "export")
    _check_inputs(source, steps)
    folders = [out / f"{number:02}-{name}" for number, (name, _) in enumerate(steps, 1)]
    numbered = [f for name in STAGES for f in sorted(out.glob(f"[0-9][0-9]-{name}"))]
    stale = [f for f in numbered if (f / MANIFEST).is_file() and f not in (source, *folders)]
    if stale:
        raise OutputError(f"{stale[0]} belongs to another recipe; delete it, or choose another output folder")
    missing = [STAGES[name].disk for (name, _), folder in zip(steps, folders, strict=True) if not (folder / MANIFEST).is_file()]
    check_disk(out, int(folder_bytes(source) * sum(missing)))
    ahead = [step for step, folder in zip(steps, folders, strict=True) if not (folder / MANIFEST).is_file()]
    expected = expect(source, ahead, matmul_rate())
    if ahead:
        kept = len(steps) - len(ahead)
        log.info("build: %s%s", expected.line(), f", with {kept} stages done already" if kept else "")
    done: list[Artifact] = []
    for (name, options), folder in zip(steps, folders, strict=True):
        if isinstance(options, BenchOptions):
            options = _with_comparisons(original, out, steps, done, options)
        if isinstance(options, ExportOptions):
            options = dataclasses.replace(options, reference=options.reference or original.path)
        if isinstance(options, HealOptions):
            options = dataclasses.replace(options, original=options.original or original.path)
        artifact = stages.run(name, artifact, folder, options)
        done.append(artifact)
    if ahead:
        _record_cost(out, expected, time.monotonic() - begun)
    return done


def _record_cost(out: Path, expected: Expectation, seconds: float) -> None:
    """Expected beside taken, in build.json and in one line."""
    memory = peak_memory()
    taken = {"seconds": round(seconds), "memory_bytes": memory}
    write_json(out / "build.json", {"expected": expected.facts(), "taken": taken})
    used = "" if memory is None else f" and {memory / 1e9:.1f} GB in its largest process"
    log.info("build: took %.0f min %02.0f s%s", seconds // 60, seconds % 60, used)


def _with_comparisons(original: Artifact, out: Path, steps: Plan, done: list[Artifact], options: BenchOptions) -> BenchOptions:
    """The bench options of a build: the original, the checkpoints in between, and the same model quantized without removal."""
    between = tuple(a.path for a in done if a.format in ("hf", "packed") and a.changed)
    options = dataclasses.replace(options, reference=options.reference or original.path, stages=options.stages or between)
    removed = any(step.facts.get("removed_layers") for step in done[-1].steps)
    if not (options.baseline and removed):
        return options
    log.info("baseline: the same without removal, to compare with (--no-baseline leaves it out)")
    level = next((step.facts["accuracy_level"] for step in reversed(done[-1].steps) if "accuracy_level" in step.facts), None)
    artifact = original
    kept = [(name, given) for name, given in steps if STAGES[name].gives in ("packed", "onnx")]
    for number, (name, given) in enumerate(kept, 1):
        if isinstance(given, QuantizeOptions) and (chosen := _chosen(done)):
            given = dataclasses.replace(given, max_growth=None, **chosen)
        if level is not None and isinstance(given, ExportOptions):  # or the two would differ in more than their layers
            exact_layers = given.exact_layers if level else None
            given = dataclasses.replace(given, accuracy_level=str(level), max_added_kl=None, exact_layers=exact_layers)
        artifact = stages.run(name, artifact, out / "baseline" / f"{number:02}-{name}", given)
    return dataclasses.replace(options, compare_with=(*options.compare_with, artifact.path))


def _chosen(done: list[Artifact]) -> JsonObject:
    """What the quantize stage settled itself, if it did."""
    chosen: JsonObject = next((step.facts["chosen"] for step in done[-1].steps if "chosen" in step.facts), {})
    return chosen
