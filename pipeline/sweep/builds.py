"""The file of a sweep, and the builds that it asks for: every model by every recipe within every budget."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from edgepress.pipeline import recipe, stages
from edgepress.pipeline.checkpoint.source import resolve
from edgepress.pipeline.documents import MAX_YAML, DocumentError, parse_yaml, typed
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import expanded, real
from edgepress.pipeline.flags import Options, make
from edgepress.pipeline.options import BenchOptions, BoundOptions, TrimOptions
from edgepress.pipeline.registry import load, suggestion
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.text.reading import read_text

Flags = dict[str, object]
_OF_A_BUILD = {"reference", "compare_with", "stages", "plans"}  # what the sweep itself tells bench
_LONGEST = 100  # characters of a name, which has others added to it in names of files


@dataclass(frozen=True)
class SweepFile:
    """What ``models``, ``recipes``, ``budgets`` (each the flags of a build) and ``bench`` (flags of bench) say."""

    models: tuple[str, ...]
    recipes: tuple[str, ...] = ("default",)
    budgets: tuple[Flags, ...] = ({},)
    bench: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """One of the builds: its folder's name, its model's name, what is built, its recipe, and what overrides that.

    source: a checkpoint, or a GGUF file whose codes are kept. original: the checkpoint that it is compared with. alone: whether its
    speed bounds are measured while it is planned, so that nothing else may run on its machine. trimmed: whether its tokens are not
    those of the original.
    """

    name: str
    title: str
    source: Path
    original: Path
    recipe: str
    flags: Flags
    alone: bool = False
    trimmed: bool = False

    def plan(self) -> tuple[list[tuple[str, Options]], BoundOptions]:
        """Its stages but for the measuring, and its bounds. Raises OptionError."""
        bounds, flags = recipe.split_bounds(self.flags)
        wanted = {name: options for name, options in recipe.read(self.recipe).items() if name != "bench"}
        steps = recipe.plan(wanted, flags)
        if "export" not in dict(steps):
            raise OptionError(f"a sweep measures what ships, and recipe {self.recipe} has no export; add it")
        return steps, bounds


@dataclass(frozen=True)
class Sweep:
    """All builds of a file, in its order, and what they are measured by."""

    builds: tuple[Build, ...]
    bench: Flags

    @property
    def sets(self) -> dict[str, list[Build]]:
        """Which are measured beside one another, by name: those of a model, but for those with other tokens."""
        names: dict[str, list[Build]] = {}
        for build in self.builds:
            names.setdefault(build.name if build.trimmed else build.title, []).append(build)
        return names


def read(file: Path) -> Sweep:
    """The builds that a file asks for; models are resolved and every plan is made once. Raises OptionError and InputError.

    Paths in it are relative to it.
    """
    if not file.is_file():
        raise OptionError(f"no such file: {file}; give a YAML file with 'models: [SRC, ...]' and, if you like, recipes and budgets")
    try:
        with file.open("rb") as opened:
            content = parse_yaml(opened.read(MAX_YAML + 1))
    except DocumentError as error:
        raise OptionError(f"{file} is {error}; correct it") from error
    known = [item.name for item in fields(SweepFile)]
    if not isinstance(content, dict) or "models" not in content:
        raise OptionError(f"{file} must name models, as in 'models: [reference]', and may have {', '.join(known[1:])}")
    if unknown := [str(key) for key in content if key not in known]:
        raise OptionError(f"{file} has no use for '{unknown[0]}'{suggestion(unknown[0], known)}; there are: {', '.join(known)}")
    try:
        given = typed(SweepFile, content, str(file))
    except DocumentError as error:
        raise OptionError(f"{error}; correct {file}") from error
    for name in ("models", "recipes", "budgets"):
        if not getattr(given, name):
            raise OptionError(f"{file} has an empty list of {name}; give at least one, or leave it out")
    folder = real(file).parent
    builds = [build for model in dict.fromkeys(given.models) for build in _builds(folder, model, given)]
    if twice := [build for number, build in enumerate(builds) if _same(build) in map(_same, builds[:number])]:
        raise OptionError(f"{file} asks for {twice[0].name} twice; leave one of them out")
    return Sweep(tuple(_named_apart(builds)), _bench(folder, given.bench, builds))


def _builds(folder: Path, model: str, given: SweepFile) -> list[Build]:
    beside = folder / expanded(model)
    named = str(beside) if beside.exists() and model != "reference" else model
    original, title = stages.source_of(named).path, recipe.default_out(named).name.removesuffix(".gguf")
    made = []
    for chosen in given.recipes:
        file = folder / expanded(chosen)
        name = str(file) if file.is_file() else chosen
        for budget in given.budgets:
            flags = recipe.resolve_texts(folder, budget)
            keeps = "import" in recipe.read(name) or bool(flags.get("keep_codes"))  # of the file itself
            parts = [title, Path(chosen).stem, *(f"{key}-{value}" for key, value in budget.items())]
            build = Build("-".join(parts), title, real(resolve(named)) if keeps else real(original), real(original), name, flags)
            steps, bounds = build.plan()
            trimmed = any(isinstance(options, TrimOptions) for _, options in steps)
            made.append(replace(build, alone=bounds.given and bounds.machine is None, trimmed=trimmed))
    return made


def _same(build: Build) -> tuple[Path, str, str]:
    return build.source, build.recipe, repr(sorted(build.flags.items()))


def _named_apart(builds: list[Build]) -> list[Build]:
    """The same with names, and titles, that are folders' names: short, all different, and unlike those of stages."""
    titles = _apart([(_slug(build.title), str(build.original)) for build in builds])
    named = _apart([(_slug(build.name), repr(_same(build))) for build in builds])
    return [replace(build, title=title, name=name) for build, title, name in zip(builds, titles, named, strict=True)]


def _apart(names: list[tuple[str, str]]) -> list[str]:
    """Names of things; the same name of different things gets what tells them apart."""
    counts = Counter(name for name, _ in set(names))
    return [name if counts[name] == 1 else f"{name}-{hashlib.sha256(of.encode()).hexdigest()[:6]}" for name, of in names]


def _slug(name: str) -> str:
    slug = re.sub(r"[^\w.+-]+", "-", name).replace("_", "-").strip("-.") or "model"
    if len(slug) > _LONGEST:
        slug = f"{slug[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"model-{slug}" if re.match(r"\d\d-", slug) else slug  # or a report would take it for a stage of a build


def _bench(folder: Path, given: Flags, builds: list[Build]) -> Flags:
    """The flags of bench, checked as far as can be before anything is built."""
    flags = recipe.resolve_texts(folder, given)
    if own := sorted(_OF_A_BUILD & flags.keys()):
        raise OptionError(f"a sweep itself tells bench {own[0]}; leave it out")
    if "threads" in flags and any(build.alone for build in builds):
        raise OptionError("bounds on speed are planned with all threads; leave threads out of bench, or the bounds")
    options = make(BenchOptions, flags)
    read_text(options.text, options.text_key)
    if foresee := STAGES["bench"].foresee:
        load(foresee)(builds[0].original, options, 0)
    return flags
