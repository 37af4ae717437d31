"""README and docs hold what they promise: links, files, targets, flags and figures exist, and the Python example runs."""

from __future__ import annotations

import argparse
import re
import shlex
from functools import partial
from pathlib import Path

import edgepress.pipeline as api
import pytest
from edgepress.pipeline.cli.parser import parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# The README's example with the cheapest of every stage, and nothing measured.
FAST_RECIPE = """
prune: {criterion: bi, calibration_tokens: 512}
quantize: {method: rtn}
export: {accuracy_level: 0}
"""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def code(page: Path) -> str:
    """What a page sets in code: commands of blocks, line by line, and code spans."""
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks(page, "sh"), *re.findall(r"`([^`]+)`", prose)])


def links(page: Path) -> list[Path]:
    """The files that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    return [(page.parent / target).resolve() for target in targets if "://" not in target]


def flags_of(command: str | None) -> set[str]:
    """The flags of a command, or those of all."""
    verbs = next(action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    chosen = verbs.values() if command is None else [verbs[command]]
    return {flag for verb in chosen for flag in verb._option_string_actions} | set(parser()._option_string_actions)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(README, "python")
    (tmp_path / "fast.yaml").write_text(FAST_RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "build", partial(api.build, recipe="fast.yaml"))
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 5  # the continuation, without the prompt


@every_page
def test_python_examples_name_what_exists(page: Path) -> None:
    for example in blocks(page, "python"):
        for line in re.findall(r"^(?:from|import) edgepress.*", example, re.MULTILINE):
            exec(line, {})


@every_page
def test_links_resolve(page: Path) -> None:
    missing = [target for target in links(page) if not target.exists()]
    assert not missing


def test_headings_that_are_linked_exist() -> None:
    for page in PAGES:
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
        headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert set(re.findall(r"\]\(#([^)]+)\)", page.read_text())) <= headings, page


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, ahead = {README}, [README]
    while ahead:
        new = {target for target in links(ahead.pop()) if target.suffix == ".md" and target.exists()} - reached
        reached |= new
        ahead += new
    assert not set(PAGES) - reached


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w./-])(?:pipeline|exporters|models|tests|benchmarks|docs)/[\w./-]*\w", page.read_text())
    missing = sorted({name for name in named if not (ROOT / name).exists() and "mine" not in name})  # the reader's own
    assert not missing


@every_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^make ([a-z][a-z-]*)", code(page), re.MULTILINE)) <= targets


def test_every_target_is_explained_or_is_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)) - explained == {"help"}


def test_flags_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README.read_text())) - {"--extra-index-url"}
    assert named <= flags_of(None)


@every_page
def test_commands_take_the_flags_that_are_shown(page: Path) -> None:
    wrong = []
    for command, rest in re.findall(r"(?:^|bin/)edgepress ([a-z]+)(.*)", code(page), re.MULTILINE):
        given = set(re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", rest.partition(" #")[0]))
        wrong += [f"edgepress {command} {flag}" for flag in sorted(given - flags_of(command))]
    assert not wrong


def test_every_figure_of_the_readme_is_printed_in_the_docs() -> None:
    printed = "".join((ROOT / "docs" / page).read_text() for page in ("engines.md", "real-models.md"))
    results = README.read_text().partition("## Results")[2].partition("## Install")[0]
    cells = {cell.strip() for line in results.splitlines() if line.startswith("|") for cell in line.split("|")}
    figures = {cell for cell in cells if re.match(r"\d", cell)}
    assert len(figures) > 40
    assert not {figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", printed)}


def test_shell_examples_can_be_parsed() -> None:
    for page in PAGES:
        for block in blocks(page, "sh"):
            shlex.split(block, comments=True)
