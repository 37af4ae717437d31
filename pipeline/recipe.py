"""Recipes: which stages, in which order, with which options; checked whole before a weight is read, then built."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from edgepress.models import RECIPES
from edgepress.models.pruned_config import layer_count_key
from edgepress.models.real import REAL_MODELS
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact, Step, check_free
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.documents import MAX_YAML, DocumentError, parse_yaml
from edgepress.pipeline.effort import DEFAULT, settings
from edgepress.pipeline.errors import OptionError, OutputError
from edgepress.pipeline.expectation import Expectation, expect, matmul_rate
from edgepress.pipeline.files import MANIFEST, PLAN, JsonObject, check_disk, discard_part, expanded, folder_bytes, real, write_json
from edgepress.pipeline.flags import Options, flag, make
from edgepress.pipeline.lock import writing
from edgepress.pipeline.machine import available_memory, peak_memory, release_memory
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.model_files import read_config
from edgepress.pipeline.options import (
    BLOCKS,
    NONE,
    WEB,
    WRITTEN,
    BenchOptions,
    BoundOptions,
    ExportOptions,
    HealOptions,
    ImportOptions,
    NarrowOptions,
    PlanOptions,
    PruneOptions,
    QuantizeOptions,
    TrimOptions,
    TuneOptions,
)
from edgepress.pipeline.registry import load, look_up, suggestion
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.text.reading import KEY, read_text
from edgepress.pipeline.vocabulary import FORMATS

log = logging.getLogger("edgepress")
Recipe = dict[str, dict[str, object]]  # stage -> option -> value, as YAML gives them
Plan = list[tuple[str, Options]]
LONG = 20.0  # seconds of a stage after which a build says how much is left
COST = "build.json"  # in OUT: what a build was expected to take, and what it took
UNBOUNDED, _USUAL = BoundOptions(), QuantizeOptions()
_SETTLED = {"bits", "bits_for", "target_bits", "max_growth", "group_size", "head_bits", "rare_rows", "embedding_bits"}
_BITS = ({"bits", "bits_for"}, {"max_growth"}, {"target_bits", "native_bits"}, {"max_size", "native_bits"})
_AMOUNTS = {"remove_count", "remove_fraction", "max_loss", "remove_layers"}
_TEXTS = ("calibration", "text", "other_text")
_MANY_TEXTS = ("keep_text", "task_files")
_TIGHT = 0.1  # nats a token
_CHECKPOINTS = ("hf", "packed")  # formats of what stages between source and artifact write
_OF_WEIGHTS = ("quantize", "tune", "export", "bench")
_TRIM = {"keep_tokens", "keep_text", "languages"}
# What another quantization method need not understand.
METHOD_OPTIONS = (
    "method", "bits", "bits_for", "group_size", "symmetric", "act_order", "max_growth", "target_bits", "max_size", "native_bits",
)  # fmt: skip


def read(name: str) -> Recipe:
    """A recipe from a YAML file or by the name of a shipped one: of a model's, as ``smollm2-135m:balanced``. Raises OptionError."""
    shipped = _shipped()
    file = expanded(name)
    if not file.is_file():
        if name not in shipped:
            known = ", ".join(shipped)
            raise OptionError(f"no recipe '{name}'{suggestion(name, shipped)}; give a YAML file or one of: {known}")
        file = shipped[name]
    try:
        with file.open("rb") as opened:
            content = parse_yaml(opened.read(MAX_YAML + 1))
    except DocumentError as error:
        raise OptionError(f"{file} is {error}; correct it") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise OptionError(f"{file} must map each stage to its options, as in 'quantize: {{method: gptq}}'")
    if not content:
        raise OptionError(f"{file} names no stage; give at least one of: {', '.join(STAGES)}")
    return {str(stage): resolve_texts(file.parent, options or {}) for stage, options in content.items()}


def _shipped() -> dict[str, Path]:
    """The files of the shipped recipes, by name."""
    of_any = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    return of_any | {f"{file.parent.name}:{file.stem}": file for file in sorted(RECIPES.glob("*/*.yaml"))}


def recipes_of(source: Path) -> list[str]:
    """The names of the shipped recipes of a model that ``edgepress fetch`` brings; none of another file."""
    for model in REAL_MODELS.values():
        if source.name == model.file and source.is_file() and source.stat().st_size == model.bytes:
            return [name for name in _shipped() if name.startswith(f"{model.recipes}:")]
    return []


def given_by(name: str) -> str:
    """The options that a recipe gives, as flags: ``prune --max-loss 0.01; heal --healer linear; ...``."""
    return "; ".join(" ".join([stage, *(f"{flag(k)} {v}" for k, v in options.items())]) for stage, options in read(name).items())


def resolve_texts(folder: Path, options: Mapping[str, object] | dict[object, object]) -> dict[str, object]:
    """Options as a file in ``folder`` gives them: it travels with its texts, whose paths are relative to it."""
    named = {str(key).removeprefix("--").replace("-", "_"): value for key, value in options.items()}
    texts = {
        key
        for key in (*_TEXTS, "machine")
        if isinstance(named.get(key), str) and (key, named[key]) not in {("calibration", str(text)) for text in WRITTEN}
    }
    beside = {key: str(folder / expanded(str(value))) if key in texts else value for key, value in named.items()}
    for key in _MANY_TEXTS:
        if kept := beside.get(key):
            beside[key] = [str(folder / expanded(str(text))) for text in (kept if isinstance(kept, list) else [kept])]
    return beside


def plan(recipe: Mapping[str, Mapping[str, object]], flags: Mapping[str, object], effort: str = DEFAULT) -> Plan:
    """Options of every stage: the recipe's, overridden by flags (each goes to every stage that has it), the rest by ``effort``.

    An import, which a source that is no GGUF file does without, may come first; ``keep_codes`` adds it.
    Raises OptionError for an unknown stage or option, a bad value, stages whose formats do not follow each other,
    or a flag that no stage of the recipe takes.
    """
    planned: Plan = []
    unused = set(flags)
    if "keep_codes" in flags and "import" not in recipe:
        recipe = {"import": {}, **recipe}
    if not _TRIM.isdisjoint(flags) and "trim" not in recipe:
        first = {name: recipe[name] for name in ("import",) if name in recipe}
        recipe = {**first, "trim": {}, **{name: given for name, given in recipe.items() if name not in first}}
    if "remove_channels" in flags and "narrow" not in recipe:
        late = [name for name in recipe if name in _OF_WEIGHTS]  # what changes weights alone comes before
        rest = {name: recipe[name] for name in late}
        recipe = {**{name: given for name, given in recipe.items() if name not in rest}, "narrow": {}, **rest}
    format: str = "gguf" if next(iter(recipe)) == "import" else "hf"
    for name, given in recipe.items():
        stage = look_up(STAGES, name, "stage")
        if name == "trim" and any(before != "import" for before, _ in planned):
            raise OptionError("trim must come before all other stages, which are compared with the model that it leaves")
        if format not in stage.takes:
            raise OptionError(
                f"{name} cannot come here: it takes {' or '.join(FORMATS[taken] for taken in stage.takes)}, "
                f"but {'the previous stage leaves' if planned else 'the source is'} {FORMATS[format]}"
                + ("; codes that are kept are for quantize and export, as in --recipe codes" if format == "codes" else "")
            )
        names = {item.name for item in dataclasses.fields(stage.options)}
        overrides = {key: value for key, value in flags.items() if key in names}
        unused -= set(overrides)
        options = {**_not_replaced(given, overrides), **overrides}
        options |= settings(effort, name, options)
        planned.append((name, make(stage.options, options, f"option of {name}")))
        format = stages.format_of(*planned[-1])
    if unused:
        raise OptionError(f"no stage of this recipe ({', '.join(recipe)}) takes {min(unused).replace('_', '-')}")
    _check_web(dict(planned))
    heals = any(isinstance(options, HealOptions) and options.healer != "none" for _, options in planned)
    return [(name, _with_criterion(options, heals)) for name, options in planned]


def _check_web(steps: Mapping[str, Options]) -> None:
    """Raise OptionError where what a browser shall run would not have 8 bits and one scale a row."""
    export, quantize = steps.get("export"), steps.get("quantize")
    if not isinstance(export, ExportOptions) or export.target != WEB:
        return
    if "tune" in steps:
        raise OptionError(f"--target {WEB} needs one scale a row, and tune trains more; leave tune or the target out: --recipe web")
    keeps = isinstance(first := steps.get("import"), ImportOptions) and first.keep_codes
    if isinstance(quantize, QuantizeOptions) and quantize.max_size is not None:
        raise OptionError(f"--max-size chooses fewer bits than --target {WEB} runs; leave one of them out")
    if keeps or (isinstance(quantize, QuantizeOptions) and not quantize.fits_web):
        raise OptionError(
            f"--target {WEB} needs 8 bits and one scale a row, and {'--keep-codes' if keeps else 'quantize'} would give others; "
            "take --recipe web, or give --method rtn --bits 8 --group-size -1"
        )


def _with_criterion(options: Options, heals: bool) -> Options:
    """Layers are chosen by what they cost after healing where a stage heals, else by what they cost as they go."""
    if not isinstance(options, PruneOptions) or options.criterion or options.remove_layers:
        return options
    return dataclasses.replace(options, criterion="healed" if heals else "greedy")


def _not_replaced(given: Mapping[str, object], flags: Mapping[str, object]) -> dict[str, object]:
    """The recipe's options of one stage, without those that a flag makes meaningless."""
    kept = dict(given)
    if str(count := kept.get("remove_layers", "")).isdecimal():  # the former spelling of a count
        raise OptionError(f"remove_layers takes indices, as [4, 5]; for a count write remove_count: {count}")
    if not _AMOUNTS.isdisjoint(flags):  # ways to say what to remove exclude each other: a flag replaces them all
        kept = {k: v for k, v in kept.items() if k not in _AMOUNTS and not (k == "criterion" and "remove_layers" in flags)}
    if flags.get("method", kept.get("method")) != kept.get("method"):  # the settings of one method mean nothing to another
        kept = {k: v for k, v in kept.items() if k not in METHOD_OPTIONS}
    for ways in _BITS:  # ways to say which bits exclude each other, too
        if not ways.isdisjoint(flags):
            kept = {k: v for k, v in kept.items() if k in ways or not any(k in others for others in _BITS)}
    return kept


def _check_inputs(source: Path, steps: Plan) -> None:
    """What the last stage would stumble over is found before the first begins. Raises TextError, OptionError."""
    from edgepress.pipeline.text.windows import context_length, proof_window, text_windows  # not needed for --help

    config = read_config(source)
    for _, options in steps:
        for name in _TEXTS:
            if isinstance(text := getattr(options, name, None), Path) and (name != "calibration" or text not in WRITTEN):
                read_text(text, getattr(options, "text_key", KEY))
        if isinstance(options, PruneOptions):
            options.amount(config[layer_count_key(config)])
        if isinstance(options, ExportOptions):
            text_windows(options.text, source, budget=proof_window(source), length=proof_window(source), key=options.text_key)
        if isinstance(options, BenchOptions):
            longest = max(options.lengths_within(context_length(source)))
            text_windows(options.text, source, budget=max(options.text_tokens, longest), key=options.text_key)


def _check_ahead(source: Path, ahead: Plan) -> None:
    """The same of what takes seconds to look up, by the stages that will run. Raises what they raise."""
    config, removed = read_config(source), 0
    stay = layers = int(config[layer_count_key(config)])
    made_smaller = any(isinstance(options, TrimOptions | NarrowOptions) for _, options in ahead)  # in ways that shapes do not tell
    for name, options in ahead:
        if isinstance(options, PruneOptions):
            counted = options.max_loss is None and options.parts == BLOCKS
            removed = options.amount(layers) if counted else 0
            # At least. A limit may take all but one; below this one nobody has lost half.
            stay = layers - removed if counted else layers - layers // 2 if (options.max_loss or 1.0) <= _TIGHT else 1
        if isinstance(options, QuantizeOptions) and options.max_size is not None and not made_smaller:
            load("edgepress.pipeline.quantize.budget:check_possible")(source, options, stay)
        if foresee := STAGES[name].foresee:
            load(foresee)(source, options, removed)


def _resolve_models(options: Options) -> Options:
    """Models that a recipe names may be anything that the source may be."""
    named = {name: getattr(options, name, None) for name in ("original", "reference", "calibration_model")}
    return dataclasses.replace(
        options, **{name: stages.source_of(str(value)).path for name, value in named.items() if value is not None}
    )


def _calibrated_by(model: Path, options: Options) -> Options:
    """Where the calibration text is the model's own, every stage reads that of the model that the build began with."""
    if (
        not isinstance(options, PruneOptions | HealOptions | NarrowOptions | QuantizeOptions | TuneOptions)
        or options.calibration not in WRITTEN
    ):
        return options
    return dataclasses.replace(options, calibration_model=options.calibration_model or model)


def recipe_for(source: str, flags: Mapping[str, object]) -> str:
    """The name of the shipped recipe that a source is built by where none is given."""
    if flags.get("keep_codes"):
        return "codes"
    if flags.get("target") == WEB:
        return "web"
    return "reference" if source == "reference" else "default"


def default_out(source: str) -> Path:
    """Where a build goes where nothing else is said: ``out/NAME``."""
    path = expanded(source)
    return Path("out") / (real(path).name if path.name in ("", "..") else path.name)


def shipped_artifact(done: Sequence[Artifact]) -> Artifact:
    """What a build ships: the last ONNX artifact of its stages, else what the last stage wrote."""
    return next((artifact for artifact in reversed(done) if artifact.format == "onnx"), done[-1])


def split_bounds(flags: Mapping[str, object]) -> tuple[BoundOptions, dict[str, object]]:
    """The bounds among the flags of a build, and the others. Raises OptionError."""
    names = {item.name for item in dataclasses.fields(BoundOptions)}
    bounds = make(BoundOptions, {name: value for name, value in flags.items() if name in names})
    rest = {name: value for name, value in flags.items() if name not in names}
    settled = {name: given for name, given in rest.items() if name in _SETTLED and (name, given) != ("rare_rows", [NONE])}
    if bounds.machine is not None and not bounds.given:
        raise OptionError("--machine says how fast another computer is; give --min-speed, --max-memory or --max-ttft, too")
    if bounds.given and (clash := sorted(settled)):
        raise OptionError(f"{bounds.first} chooses the bits of every matrix itself; leave {flag(clash[0])} out")
    return bounds, rest


def build(source: Path, out: Path, steps: Plan, bounds: BoundOptions = UNBOUNDED, keep: bool = True) -> list[Artifact]:
    """Run a plan into ``out/01-...``, ``out/02-...``; a stage that is done already, and unchanged, is kept.

    What it was expected to take and what it took stands in ``out/build.json``. keep: the weights of each stage; otherwise they go
    once the next one is done, but for those of an import, with which the benchmark compares.
    Raises OutputError, which names it, when another edgepress writes there.
    """
    stages.check_outside(out, source)
    _check_no_artifact(out)  # before a lock lies in it
    with writing(out, build=True):
        return _build(source, out, steps, bounds, keep)


def _build(source: Path, out: Path, steps: Plan, bounds: BoundOptions, keep: bool) -> list[Artifact]:
    begun = time.monotonic()
    original, importing = Artifact.load(source), ImportOptions()
    file = original.path if original.format == "gguf" else None
    if isinstance(given := steps[0][1], ImportOptions):
        importing, steps = given, steps[1:]
    if original.format == "gguf":
        original = stages.run("import", original, out / "00-import", importing)
        source = original.path
    elif importing.keep_codes:
        raise OptionError(f"--keep-codes is for a GGUF file, and {source} is none; leave it out")
    own = [original.path]
    if steps and isinstance(trimming := steps[0][1], TrimOptions):
        _check_inputs(original.path, steps[1:])
        original, steps = stages.run("trim", original, out / "00-trim", trimming), steps[1:]
        source = original.path
    if not steps:
        return [original]
    artifact = original
    steps = [(name, _calibrated_by(source, _resolve_models(options))) for name, options in steps]
    check_checkpoint(source, bool(getattr(steps[0][1], "trust_remote_code", False)), quantized=steps[0][0] == "export")
    _check_inputs(source, steps)
    folders = [out / f"{number:02}-{name}" for number, (name, _) in enumerate(steps, 1)]
    for folder in folders:
        stages.check_outside(folder, source)
    numbered = [f for name in STAGES for f in sorted(out.glob(f"[0-9][0-9]-{name}"))]
    _check_no_artifact(out)
    made = {real(folder) for folder in (*own, source, *folders)}
    stale = [f for f in numbered if (f / MANIFEST).is_file() and real(f) not in made]
    if stale:
        raise OutputError(f"{stale[0]} belongs to another recipe; delete it, or choose another output folder")
    found = None
    if bounds.given:
        for folder in folders:
            check_free(folder)
        steps, found = _keeping_to(bounds, original, out, steps)
    else:
        (out / PLAN).unlink(missing_ok=True)
    ahead = _ahead(original, steps, folders)
    if ahead:  # a finished build may lie on a disk that is read-only
        disk = [STAGES[name].disk for name, _ in ahead]
        together = sum(disk) if keep else max(map(sum, pairwise([0.0, *disk])))
        check_disk(out, int(folder_bytes(source) * together))
    for folder in folders[len(folders) - len(ahead) :]:
        check_free(folder)
    _check_ahead(source, ahead)
    rate, kept = matmul_rate() if ahead else 0.0, len(steps) - len(ahead)
    expected = expect(source, ahead, rate, _removed(folders)) if ahead else None
    if expected:
        log.info("build: %s%s", expected.line(), f", with {kept} stages done already" if kept else "")
        if shortage := expected.shortage(available_memory()):
            log.warning("warning: %s", shortage)
    done: list[Artifact] = []
    for (name, options), folder in zip(steps, folders, strict=True):
        release_memory()  # of the stage before
        if isinstance(options, BenchOptions):
            plans = (out / PLAN,) if found is not None else ()
            options = _with_comparisons(original, out, steps, done, dataclasses.replace(options, plans=plans))
        since = time.monotonic()
        former = Artifact.load(folder) if len(done) < kept else None
        if former and former.thinned:
            log.info("%s: already done, its weights are gone (--keep-stages no)", name)
            artifact = former
        elif former and done and done[-1].thinned and not former.damaged():
            log.info("%s: already done, kept %s", name, folder)
            artifact = former
        else:
            artifact = stages.run(name, artifact, folder, _informed(options, original, steps))
            if not keep and done and done[-1].format in _CHECKPOINTS:
                done[-1].thin()
        done.append(artifact)
        if len(done) > kept and (left := steps[len(done) :]) and time.monotonic() - since >= LONG:
            log.info("build: about %s are left", expect(source, left, rate, _removed(folders)).duration)
    if file is not None:
        _compare_with(file, shipped_artifact(done))
    if expected:
        _record_cost(out, expected, time.monotonic() - begun)
    else:
        discard_part(out / COST)
    if found is not None and done[-1].format == "report":
        load("edgepress.pipeline.plan.bounds:compare")(found, done[-1].path / "report.json")
    return done


def _keeping_to(bounds: BoundOptions, original: Artifact, out: Path, steps: Plan) -> tuple[Plan, object]:
    """The steps with the size of the best artifact that keeps to the bounds, and what is expected of it.

    It is looked for among those of the whole model: what a stage removes before makes it faster at equal size, not slower.
    """
    given, asked = dict(steps), bounds.first
    quantize, export, bench = given.get("quantize"), given.get("export"), given.get("bench", BenchOptions())
    if not isinstance(quantize, QuantizeOptions) or not isinstance(export, ExportOptions):
        raise OptionError(f"{asked} is for a recipe with quantize and export among its stages; leave it out")
    assert isinstance(bench, BenchOptions)
    if export.target != "cpu":
        raise OptionError(f"{asked} is of this machine's CPU, and the target is {export.target}; leave one of them out")
    if not METHODS[quantize.method].adjustable:
        raise OptionError(f"{asked} chooses the bits of every matrix, and {quantize.method} has none to choose; leave --method out")
    usual = dataclasses.replace(_USUAL, rare_rows=(NONE,) if quantize.rare_rows == (NONE,) else ())
    if settled := [name for name in sorted(_SETTLED - {"max_growth"}) if getattr(quantize, name) != getattr(usual, name)]:
        raise OptionError(f"{asked} chooses the bits of every matrix, and the recipe gives {settled[0]}; leave one of them out")
    usual_export = ExportOptions()
    others = [name for name in ("exporter", "accuracy_level", "cache") if getattr(export, name) != getattr(usual_export, name)]
    if bounds.machine is not None and others:
        raise OptionError(f"--machine is of artifacts that are exported with no flags; leave {flag(others[0])} out")
    _check_ahead(original.path, steps)  # before minutes of measuring
    known = {item.name for item in dataclasses.fields(PlanOptions)} & {item.name for item in dataclasses.fields(QuantizeOptions)}
    values = {name: getattr(quantize, name) for name in known}
    wish = PlanOptions(**{**vars(bounds), **values, "tuned": "tune" in given, "threads": bench.threads})
    found = load("edgepress.pipeline.plan.bounds:planned")(original, wish, export, out / PLAN)
    sized = dataclasses.replace(quantize, max_growth=None, max_size=found.max_size, native_bits=found.point.native)
    return [(name, sized if name == "quantize" else options) for name, options in steps], found


def _ahead(original: Artifact, steps: Plan, folders: Sequence[Path]) -> Plan:
    """The stages that are not done, or done otherwise, and those of whose result they are made, where its weights are gone.

    What bench compares is known when it begins: it counts if another does.
    """
    artifact, before = original, list[Artifact]()
    for (name, options), folder in zip(steps, folders, strict=True):
        if isinstance(options, BenchOptions):
            done = Artifact.load(folder) if (folder / MANIFEST).is_file() else None
        else:
            options = _informed(options, original, steps).resolved()
            done = stages.made(folder, stages.fingerprint(name, options, artifact))
        if done is None:
            while before and before[-1].thinned:
                before.pop()
            return steps[len(before) :]
        artifact = done
        before.append(done)
    return []


def _removed(folders: Sequence[Path]) -> bool:
    """Whether one of the folders is of a prune stage that removed layers, or of a narrow stage."""
    made = [folder for folder in folders if folder.name.endswith(("-prune", "-narrow")) and (folder / MANIFEST).is_file()]
    return any(_removes(Artifact.load(folder).steps[-1]) for folder in made)


def _removes(step: Step) -> bool:
    """Whether a finished step took something out of the blocks."""
    return step.stage == "narrow" or bool(step.facts.get("removed_layers") or step.facts.get("removed_parts"))


def _informed(options: Options, original: Artifact, steps: Plan) -> Options:
    """The options of a stage with what a build knows: the original, and whether a tune stage follows."""
    if isinstance(options, ExportOptions):
        return dataclasses.replace(options, reference=options.reference or original.path)
    if isinstance(options, HealOptions | TuneOptions):
        return dataclasses.replace(options, original=options.original or original.path)
    if isinstance(options, QuantizeOptions) and (options.max_growth is not None or options.max_size is not None):
        return dataclasses.replace(options, tuned=options.tuned or "tune" in dict(steps))
    return options


def _compare_with(file: Path, artifact: Artifact) -> None:
    """Say so where what is shipped is larger than the GGUF file of few bits that it was made from, and no size was asked for."""
    had, has = file.stat().st_size, folder_bytes(artifact.path)
    quantized = next((step.facts for step in artifact.steps if step.stage == "quantize"), None)
    if quantized is None or "max_bytes" in quantized:
        return
    if artifact.format == "onnx" and has > had and load("edgepress.pipeline.quantize.choose:quantized_before")(artifact):
        log.info(
            "build: %.1f MB, and %s has %.1f: its weights have few bits already; edgepress plan says what a smaller artifact loses",
            has / 1e6, file.name, had / 1e6,
        )  # fmt: skip


def _record_cost(out: Path, expected: Expectation, seconds: float) -> None:
    """Expected beside taken, in a file and in one line."""
    memory = peak_memory()
    taken = {"seconds": round(seconds), "memory_bytes": memory}
    write_json(out / COST, {"expected": expected.facts(), "taken": taken})
    used = "" if memory is None else f" and {memory / 1e9:.1f} GB in its largest process"
    log.info("build: took %d min %02d s%s", *divmod(round(seconds), 60), used)


def _check_no_artifact(out: Path) -> None:
    if (out / MANIFEST).is_file():
        raise OutputError(f"{out} holds {MANIFEST}, so it is what one stage wrote, not a build; choose another output folder")


def _with_comparisons(original: Artifact, out: Path, steps: Plan, done: list[Artifact], options: BenchOptions) -> BenchOptions:
    """The bench options of a build: the original, the checkpoints in between, and the same model quantized without removal."""
    between = tuple(a.path for a in done if a.format in _CHECKPOINTS and a.changed and not a.thinned)
    options = dataclasses.replace(options, reference=options.reference or original.path, stages=options.stages or between)
    removed = any(map(_removes, done[-1].steps))
    if not (options.baseline and removed):
        return options
    log.info("baseline: the same without removal, to compare with (--no-baseline leaves it out)")
    level = next((step.facts["accuracy_level"] for step in reversed(done[-1].steps) if "accuracy_level" in step.facts), None)
    artifact = original
    kept = [(name, given) for name, given in steps if STAGES[name].gives in ("packed", "onnx")]
    for number, (name, given) in enumerate(kept, 1):
        # Rules of a mix name layers of the pruned model: without removal the stage chooses again, by the same wish.
        if isinstance(given, QuantizeOptions) and (chosen := _chosen(done)) and not chosen.get("bits_for"):
            given = dataclasses.replace(given, max_growth=None, target_bits=None, max_size=None, native_bits=False, **chosen)
        if level is not None and isinstance(given, ExportOptions):  # or the two would differ in more than their layers
            exact_layers = given.exact_layers if level else None
            given = dataclasses.replace(given, accuracy_level=str(level), max_added_kl=None, exact_layers=exact_layers)
        release_memory()
        artifact = stages.run(name, artifact, out / "baseline" / f"{number:02}-{name}", _informed(given, original, steps))
    return dataclasses.replace(options, compare_with=(*options.compare_with, artifact.path))


def _chosen(done: list[Artifact]) -> JsonObject:
    """What the quantize stage settled itself, if it did."""
    chosen: JsonObject = next((step.facts["chosen"] for step in done[-1].steps if "chosen" in step.facts), {})
    return {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
