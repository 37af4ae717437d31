"""The file of a sweep, and the builds that it asks for: every model by every recipe within every budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from edgepress.pipeline import recipe, stages
from edgepress.pipeline.documents import MAX_YAML, DocumentError, parse_yaml, typed
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import expanded
from edgepress.pipeline.flags import Options, make
from edgepress.pipeline.options import BenchOptions, BoundOptions
from edgepress.pipeline.registry import suggestion

Flags = dict[str, object]


@dataclass(frozen=True)
class SweepFile:
    """What ``models``, ``recipes``, ``budgets`` (each the flags of a build) and ``bench`` (flags of bench) say."""

    models: tuple[str, ...]
    recipes: tuple[str, ...] = ("default",)
    budgets: tuple[Flags, ...] = ({},)
    bench: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """One of the builds: its folder's name, its model's name and checkpoint, its recipe, and what overrides that.

    alone: whether its speed bounds are measured while it is planned, so that nothing else may run on its machine.
    """

    name: str
    title: str
    model: Path
    recipe: str
    flags: Flags
    alone: bool

    def plan(self) -> tuple[list[tuple[str, Options]], BoundOptions]:
        """Its stages but for the measuring, and its bounds. Raises OptionError."""
        bounds, flags = recipe.split_bounds(self.flags)
        steps = recipe.plan(recipe.read(self.recipe), flags)
        return [(name, options) for name, options in steps if not isinstance(options, BenchOptions)], bounds


@dataclass(frozen=True)
class Sweep:
    """All builds of a file, in its order, and what they are measured by."""

    builds: tuple[Build, ...]
    bench: Flags

    @property
    def models(self) -> dict[str, list[Build]]:
        """The builds of each, by its name."""
        titles = dict.fromkeys(build.title for build in self.builds)
        return {title: [build for build in self.builds if build.title == title] for title in titles}


def read(file: Path) -> Sweep:
    """The builds that a file asks for; models are resolved and every plan is made once. Raises OptionError and InputError."""
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
    make(BenchOptions, _named(given.bench))
    builds = [build for model in given.models for build in _builds(file, model, given)]
    names = [build.name for build in builds]
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"{file} asks for {twice[0]} twice; leave one of them out, or give the models' folders other names")
    return Sweep(tuple(builds), _named(given.bench))


def _builds(file: Path, model: str, given: SweepFile) -> list[Build]:
    source = stages.source_of(model).path
    name = Path(expanded(model)).name.removesuffix(".gguf") or model
    made = []
    for chosen in given.recipes:
        beside = file.parent / expanded(chosen)
        chosen_file = str(beside) if beside.is_file() else chosen
        for budget in map(_named, given.budgets):
            parts = [name, Path(chosen).stem, *(f"{key}-{value}" for key, value in budget.items())]
            bounds, _ = recipe.split_bounds(budget)
            slug = re.sub(r"[^\w.+-]+", "-", "-".join(parts)).replace("_", "-").strip("-.")
            build = Build(slug, name, source, chosen_file, budget, bounds.given)
            build.plan()
            made.append(build)
    return made


def _named(flags: Mapping[str, object]) -> Flags:
    """Spelled as fields are."""
    return {key.removeprefix("--").replace("-", "_"): value for key, value in flags.items()}
