"""The command line: the only module that prints, and the only one that turns errors into exit codes.

Exit codes: 0 done, 2 something the user can mend (one line says what and how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact, read_json, write_json
from edgepress.pipeline.errors import EdgepressError, InputError, OptionError
from edgepress.pipeline.options import RunOptions, SensitivityOptions, VerifyOptions, add_flags, make
from edgepress.pipeline.source import check_checkpoint, resolve
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.table import double_runtime, load, version

if TYPE_CHECKING:
    from edgepress.pipeline.chat import Conversation


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Exit 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="edgepress", description="Press a language model into a small, fast ONNX folder, and measure what was lost.")
    top.add_argument("--version", action="version", version=f"edgepress {version('edgepress')}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=Parser)

    build = verbs.add_parser("build", help="all stages, from checkpoint to report", description=(
        "Run all stages of a recipe into OUT/01-prune, OUT/03-quantize, ... Started again after an interruption, or with some "
        "options changed, it keeps what is done and unchanged. Flags override the recipe."))  # fmt: skip
    build.add_argument("source", metavar="SRC", nargs="?", default="reference", help=_SOURCE)
    build.add_argument("out", metavar="OUT", nargs="?", type=Path, help="output folder (default: out/NAME)")
    build.add_argument(
        "--recipe", metavar="FILE", help="YAML file, or the name of a shipped one (default: 'default', and 'reference' for it)"
    )
    add_flags(build, *(stage.options for stage in STAGES.values()))

    for name, stage in STAGES.items():
        verb = verbs.add_parser(name, help=_first_line(stage.options), description=stage.options.__doc__)
        if name == "bench":
            verb.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
            verb.add_argument(
                "others", metavar="DIR", nargs="*", help="further ones: measured in turn, and compared with the first"
            )
            verb.add_argument("--out", type=Path, help="folder for the report (default: DIR-bench)")
        else:
            verb.add_argument("source", metavar="SRC", help=_SOURCE if "hf" in stage.takes else "artifact folder")
            verb.add_argument("out", metavar="OUT", type=Path, help="output folder")
        add_flags(verb, stage.options)

    report = verbs.add_parser("report", help="one page of several benchmarks", description=(
        "Gather what bench measured into one page. Speeds are compared within one bench, which measures in turn."))  # fmt: skip
    report.add_argument("sources", metavar="DIR", nargs="+", help="report folder, OUT of a build, or artifact beside its report")
    report.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="ends in .html, .md or .json (default: report.html)"
    )
    sensitivity = verbs.add_parser("sensitivity", help="which matrices need more bits", description=SensitivityOptions.__doc__)
    sensitivity.add_argument("source", metavar="SRC", help=_SOURCE)
    sensitivity.add_argument(
        "--out", type=Path, default=Path("sensitivity.json"), help="file for the figures (default: ./sensitivity.json)"
    )
    add_flags(sensitivity, SensitivityOptions)

    run = verbs.add_parser(
        "run", help="generate text on the CPU", description="Continue a prompt with onnxruntime, or --chat; tokens are streamed."
    )
    run.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue; with --chat the first message, if given")
    add_flags(run, RunOptions)

    verify = verbs.add_parser("verify", help="check an artifact", description=VerifyOptions.__doc__)
    verify.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    add_flags(verify, VerifyOptions)

    show = verbs.add_parser(
        "show", help="how an artifact came to be", description="Stages, options, facts and files, from the manifest."
    )
    show.add_argument("source", metavar="DIR", help="artifact folder, or the OUT of a build")
    return top


_SOURCE = "folder with config.json and safetensors, a hub id, or 'reference' (the embedded model)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    _log_to_terminal()
    _signals.clear()
    for name in ("SIGINT", "SIGTERM"):  # a polite kill cleans up as Ctrl-C does; a Ctrl-C that the shell ignores stays ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _stop)
    if warning := double_runtime():
        _say(f"warning: {warning}")
    own = ("verb", "debug", "source", "sources", "others", "out", "recipe", "prompt")
    flags = {k: v for k, v in vars(options).items() if k not in own}
    command = COMMANDS.get(options.verb, _stage)
    if options.debug:
        return command(options, flags)
    try:
        return command(options, flags)
    except BaseException as error:
        # Native code may swallow the KeyboardInterrupt and fail in its own way: what was asked for was to stop.
        if not _signals and not isinstance(error, KeyboardInterrupt):
            return _failed(error)
    if options.verb == "run":
        with contextlib.suppress(OSError):
            print()  # after the words so far
    more = "; nothing half-written is left" if options.verb == "build" or options.verb in STAGES else ""
    goes_on = ", and the same command goes on after the last finished stage" if options.verb == "build" else ""
    _say(f"interrupted{more}{goes_on}")
    return 130


def _failed(error: BaseException) -> int:
    """One line and exit code 2 for what the user can mend; anything else is a bug, and raised again."""
    try:
        raise error
    except EdgepressError as error:
        reason = str(error)
    except MemoryError:
        reason = "out of memory; close other programs or press a smaller model"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the disk, or a path: nothing that a traceback would explain
        where = f" {error.filename}" if error.filename else ""
        reason = f"cannot write{where}: {error.strerror or error}; free some disk space or choose another output folder"
    _say(f"error: {reason}")
    return 2


def _resolved(flags: dict[str, Any]) -> dict[str, Any]:
    """--reference and --original may be anything that SRC may be."""
    return flags | {name: resolve(flags[name]) for name in ("reference", "original") if name in flags}


_signals: list[object] = []


def _stop(number: int, frame: object) -> NoReturn:
    _signals.append(number)
    raise KeyboardInterrupt


def _build(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    chosen = options.recipe or ("reference" if options.source == "reference" else "default")
    steps = recipe.plan(recipe.read(chosen), _resolved(flags))
    source = resolve(options.source)
    out = options.out or Path("out") / Path(options.source).name
    done = recipe.build(source, out, steps)
    _print_report(done[-1])
    artifact = next((a for a in reversed(done) if a.format == "onnx"), done[-1])
    print(f"\nartifact: {artifact.path}")
    if artifact.format == "onnx":
        print(f'try:      edgepress run {shlex.quote(str(artifact.path))} "Once upon a time"')
    return 0


def _stage(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    stage = STAGES[options.verb]
    if options.verb == "bench" and options.others:
        flags = {**flags, "beside": [*map(str, _artifact_folders(options.others)), *filter(None, [flags.get("beside")])]}
    values: Any = make(stage.options, _resolved(flags))
    if options.verb == "bench":
        folder = _artifact_folder(options.source)
        out = options.out or folder.parent / f"{folder.resolve().name}-bench"
        artifact = stages.run("bench", Artifact.load(folder), out, values)
    else:
        artifact = stages.run(options.verb, Artifact.load(resolve(options.source)), options.out, values)
    if artifact.format == "report":
        _print_report(artifact)
        return 0
    if options.verb == "prune":
        from edgepress.pipeline.report import influence_table

        print(influence_table(read_json(artifact.path / "influence.json")) + "\n")
    print(artifact.path)
    return 0


def _report(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    from edgepress.pipeline.report import gather, save

    save(gather([Path(source).expanduser() for source in options.sources]), options.out)
    print(options.out)
    return 0


def _run(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    from edgepress.pipeline.generate import stream

    settings = make(RunOptions, flags)
    if options.prompt is None and not settings.chat:
        raise OptionError("give a text to continue, or --chat for a conversation; see edgepress run --help")
    folder = _artifact_folder(options.source)
    if settings.chat:
        return _chat(folder, options.prompt, settings)
    begun, count = time.monotonic(), 0
    for piece in stream(folder, options.prompt, settings):
        if not count:
            begun = time.monotonic()
        print(piece, end="", flush=True)
        count += 1
    print()
    if count > 2:  # the first piece is the prompt, the second waited for it to be read
        _say(f"{(count - 2) / (time.monotonic() - begun):.1f} tokens/s")
    return 0


def _chat(folder: Path, first: str | None, settings: RunOptions) -> int:
    talk: Conversation = load("edgepress.pipeline.chat:Conversation")(folder, settings)
    message = first
    _say("Ctrl-C ends an answer, /new starts afresh, /bye or Ctrl-D ends the talk")
    while True:
        try:
            if message is None:
                message = input("> " if sys.stdin.isatty() else "").strip()
            if message == "/bye":
                return 0
            if message == "/new":
                talk.forget()
            elif message:
                _answer(talk, message)
        except EOFError:
            return 0
        except OptionError as error:
            _say(f"error: {error}")
        except BaseException:  # native code may swallow the KeyboardInterrupt and fail in its own way
            if signal.SIGINT not in _signals or len(set(_signals)) > 1:
                raise
            _signals.clear()
            print()
            if message is None:
                _say("/bye or Ctrl-D ends the talk")
        message = None


def _answer(talk: Conversation, message: str) -> None:
    """Stream one answer and tell its speed: from its first piece on, as reading the message is another matter."""
    begun, count = time.monotonic(), 0
    with contextlib.closing(talk.answer(message)) as pieces:
        for piece in pieces:
            if not count:
                begun = time.monotonic()
            print(piece, end="", flush=True)
            count += 1
    print()
    if count > 1:
        rate = (count - 1) / (time.monotonic() - begun)
        _say(f"{rate:.1f} tokens/s, {talk.read} tokens read, {talk.decoder.length} in the context")
    if talk.full:
        _say(f"the context of {talk.decoder.context} tokens is full, so the answer ends here; /new starts afresh")


def _verify(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    from edgepress.pipeline.verify import verify

    settings = make(VerifyOptions, _resolved(flags))
    folder, states = _artifact_folder(options.source), []
    for check in verify(folder, settings):
        print(f"{check.state:<12} {check.name}: {check.says}", flush=True)
        states.append(check.state)
    if failed := states.count("failed"):
        raise InputError(f"{failed} of {len(states)} checks failed; {folder} should not be used as it is")
    return 0


def _sensitivity(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    values = make(SensitivityOptions, flags)
    folder = Artifact.load(resolve(options.source)).path
    check_checkpoint(folder, values.trust_remote_code)
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        raise InputError(f"cannot write {options.out}; give --out a file in a folder that is there")
    found = load("edgepress.pipeline.sensitivity:measure")(folder, values)
    write_json(options.out, {"model": folder.name, **found})
    print(load("edgepress.pipeline.sensitivity:table")(found))
    return 0


def _show(options: argparse.Namespace, flags: dict[str, Any]) -> int:
    folder = Path(options.source).expanduser()
    if not folder.is_dir():
        folder = resolve(options.source)
    if not (folder / "manifest.json").is_file() and any(folder.glob("*/model.onnx")):
        folder = _artifact_folder(options.source)
    artifact = Artifact.load(folder)
    if not artifact.steps:
        print(f"{folder}: a Hugging Face checkpoint ({artifact.family}), not written by edgepress")
        return 0
    print(f"{folder}: {artifact.format}, {len(artifact.files)} files")
    for number, step in enumerate(artifact.steps, 1):
        print(f"\n{number}. {step.stage}  ({step.seconds:.1f} s; {', '.join(f'{k} {v}' for k, v in step.versions.items())})")
        for title, content in (("options", step.options), ("facts", step.facts)):
            print(f"   {title}:")
            for key, value in content.items():
                text = json.dumps(value)
                print(f"     {key}: {text if len(text) <= 200 else text[:200] + ' ...'}")
    print("\nfiles:")
    for name, known in artifact.files.items():
        print(f"   {known['bytes']:>12,}  {known['sha256'][:16]}  {name}")
    damaged = artifact.damaged()
    if damaged:
        raise InputError(f"{damaged[0]} is not what the manifest says; build the folder again")
    return 0


COMMANDS = {"build": _build, "report": _report, "run": _run, "sensitivity": _sensitivity, "show": _show, "verify": _verify}


def _artifact_folder(source: str) -> Path:
    """The folder with model.onnx: given itself, or the OUT of a build that holds it. Raises InputError."""
    folder = Path(source).expanduser()
    if (folder / "model.onnx").is_file():
        return folder
    if not folder.is_dir():
        raise InputError(f"no such folder: {source}; give the folder that edgepress export or build wrote")
    found = sorted(folder.glob("*/model.onnx"))
    if not found:
        raise InputError(f"no model.onnx in {folder}; give the folder that edgepress export or build wrote")
    return found[-1].parent


def _artifact_folders(sources: Sequence[str]) -> list[Path]:
    return [_artifact_folder(source) for source in sources]


def _print_report(artifact: Artifact) -> None:
    from edgepress.pipeline.report import terminal
    from edgepress.pipeline.tables import made_by

    if artifact.format != "report":
        return
    content = read_json(artifact.path / "report.json")
    print("\n".join(["", *made_by(content), "", terminal(content)]))
    print(f"\nreport:   {artifact.path / 'report.md'}")


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("edgepress")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    # Libraries that report at import, or at each graph, what a user can do nothing about.
    for name in ("torchao", "torch.utils._pytree", "torch.onnx", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").splitlines()[0].rstrip(".").lower()


if __name__ == "__main__":
    sys.exit(main())
