"""The arrows of docs/architecture.md: who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rooms from the ground up; a room imports those of earlier lines, and none of its own line but itself.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("pipeline.errors", "pipeline.visible"),
    ("pipeline.documents",),
    (
        *(
            f"pipeline.{name}"
            for name in ("files", "interrupt", "machine", "privacy", "progress", "registry", "search_path", "vocabulary")
        ),
        "models",
    ),
    ("pipeline.lock", "pipeline.model_files"),
    ("pipeline.artifact", "pipeline.effort", "pipeline.fetch", "pipeline.flags", "pipeline.methods"),
    ("pipeline.report",),
    ("pipeline.options",),
    ("pipeline.text",),
    ("pipeline.checkpoint",),
    ("pipeline.metrics", "pipeline.runtime", "pipeline.expectation"),
    ("pipeline.own_text", "pipeline.page"),
    ("pipeline.serve",),
    ("pipeline.trim", "pipeline.prune", "pipeline.heal", "pipeline.narrow", "pipeline.quantize", "pipeline.tune", "exporters"),
    ("pipeline.bench",),
    ("pipeline.verify",),
    ("pipeline.stages",),
    ("pipeline.plan",),
    ("pipeline.recipe",),
    ("pipeline.sweep",),
    ("pipeline",),
    ("pipeline.cli",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
# These reach a stage by its string in a table alone.
BY_STRING = {"pipeline.stages", "pipeline.recipe"}
STAGES = {
    "pipeline.trim",
    "pipeline.prune",
    "pipeline.heal",
    "pipeline.narrow",
    "pipeline.quantize",
    "pipeline.tune",
    "pipeline.bench",
    "exporters",
}
# report knows its own values and the ground.
_GROUND = ("errors", "documents", "files", "progress", "registry", "methods", "visible", "vocabulary")
REPORT_KNOWS = {"models"} | {f"pipeline.{name}" for name in _GROUND}


def room_of(module: str) -> str:
    """``pipeline.heal`` for ``edgepress.pipeline.heal.lora``."""
    parts = module.removeprefix("edgepress.").split(".")
    if parts[0] != "pipeline" or len(parts) == 1:
        return parts[0]
    name = ".".join(parts[:2])
    return name if name in LEVEL else "pipeline"


def imports(source: str, module: str) -> Iterator[str]:
    """The modules of edgepress that a source text imports, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("edgepress"))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            if node.module and node.module.startswith("edgepress"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    """Every module's name and file."""
    files = [f for folder in ("pipeline", "exporters", "models") for f in (ROOT / folder).rglob("*.py")]
    return {"edgepress." + ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def faults(module: str, source: str) -> list[str]:
    """What in a module's imports goes against the arrows."""
    here, found = room_of(module), []
    for name in imports(source, module):
        there = room_of(name)
        if here == there:
            continue
        if LEVEL[there] >= LEVEL[here]:
            found.append(f"{module} imports {name}: {there} is not below {here}")
        if here in BY_STRING and there in STAGES:
            found.append(f"{module} imports {name}: stages are reached by their string in the table")
        if here == "pipeline.report" and there not in REPORT_KNOWS:
            found.append(f"{module} imports {name}: report knows its own values and the ground alone")
        if there == "exporters" and here not in ("pipeline.bench", "pipeline.verify", "pipeline.plan"):
            found.append(f"{module} imports {name}: only bench, verify and plan know exporters")
    return found


def test_arrows_point_downward() -> None:
    found = [fault for module, file in modules().items() for fault in faults(module, file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("edgepress.pipeline.checkpoint.load", "from edgepress.pipeline.prune.stage import prune"),
        ("edgepress.pipeline.prune.stage", "from edgepress.pipeline.heal.stage import heal"),
        ("edgepress.pipeline.quantize.stage", "def f():\n    from edgepress.exporters.stage import export"),
        ("edgepress.pipeline.stages", "from edgepress.pipeline.bench.stage import bench"),
        ("edgepress.pipeline.report.text", "from edgepress.pipeline.artifact import Artifact"),
        ("edgepress.models.pruned_config", "import edgepress.pipeline.options"),
    ],
)
def test_an_upward_arrow_is_found(module: str, line: str) -> None:
    assert faults(module, line)


def test_no_import_cycle() -> None:
    """Not between rooms, nor between the modules of one."""
    names = modules()
    graph: dict[str, set[str]] = {}
    for module, file in names.items():
        targets = {name if name in names else name.rpartition(".")[0] for name in imports(file.read_text(), module)}
        graph[module] = {target for target in targets if target in names and target != module}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_room_says_what_lives_in_it() -> None:
    """At most 25 rooms on the top two levels, each with a docstring of one line."""
    rooms = [f.parent for folder in ("pipeline", "exporters") for f in (ROOT / folder).rglob("__init__.py")]
    assert len(rooms) <= 25
    for room in rooms:
        docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert docstring and "\n" not in docstring.partition("\n\n")[0], room
