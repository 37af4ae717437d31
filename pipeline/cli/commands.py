"""The command line: the only module that prints, and the only one that turns errors into exit codes.

Exit codes: 0 done, 2 something the user can mend (one line says what and how), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edgepress.pipeline import interrupt, recipe, stages
from edgepress.pipeline.artifact import Artifact, bench_folder, folder_of, onnx_folder
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.source import resolve
from edgepress.pipeline.cli.conversation import chat
from edgepress.pipeline.cli.parser import parser
from edgepress.pipeline.cli.terminal import (
    check_current_folder,
    exit_code,
    log_to_terminal,
    plain_output,
    say,
    speak_utf8,
    whole_streams,
    written,
)
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import check_disk, expanded, write_json
from edgepress.pipeline.flags import make, parts
from edgepress.pipeline.machine import working_within
from edgepress.pipeline.model_files import check_model_type, read_config
from edgepress.pipeline.options import (
    MachineOptions,
    PlanOptions,
    RunOptions,
    SensitivityOptions,
    ServeOptions,
    SweepOptions,
    VerifyOptions,
    size_in_bytes,
)
from edgepress.pipeline.registry import double_runtime
from edgepress.pipeline.runtime.chat_template import has_template
from edgepress.pipeline.stages import STAGES
from edgepress.pipeline.visible import one_line

Flags = dict[str, object]  # those that were given, by option name

log = logging.getLogger("edgepress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    whole_streams()
    speak_utf8()
    try:
        with plain_output():
            return written(_main(arguments))
    except SystemExit as end:  # of --help and --version
        raise SystemExit(written(int(end.code or 0))) from None
    finally:
        interrupt.finish()


def _main(arguments: Sequence[str] | None) -> int:
    try:
        options = parser().parse_args(arguments)
        log_to_terminal()
    except KeyboardInterrupt:  # before there is a command to end
        return 130
    own = (
        "verb", "file", "debug", "source", "sources", "others", "out", "recipe", "effort", "keep_stages", "prompt", "work_memory",
    )  # fmt: skip
    flags = {k: v for k, v in vars(options).items() if k not in own}
    command = COMMANDS.get(options.verb, _stage)
    try:
        interrupt.install_handlers()
        if warning := double_runtime():
            say(f"warning: {warning}")
        check_current_folder()
        given = getattr(options, "work_memory", None)
        with working_within(None if given is None else size_in_bytes(given, "--memory")):
            return command(options, flags)
    except BaseException as error:
        interrupt.settled()
        if options.debug:
            raise
        # Native code may swallow the KeyboardInterrupt and fail in its own way; the signal still asked to stop.
        if not interrupt.signals and not isinstance(error, KeyboardInterrupt):
            return exit_code(error)
    if options.verb == "run":
        with contextlib.suppress(OSError):
            print()  # after the words so far
    building = options.verb in ("build", "sweep")
    say(interrupt.message(writes=building or options.verb in STAGES, resumes=building))
    return 130


def _resolved(flags: Flags) -> Flags:
    """--reference, --original and --calibration-model may be anything that SRC may be."""
    named = ("reference", "original", "calibration_model")
    return flags | {name: stages.source_of(str(flags[name])).path for name in named if name in flags}


def _build(options: argparse.Namespace, flags: Flags) -> int:
    chosen = options.recipe or recipe.recipe_for(options.source, flags)
    bounds, flags = recipe.split_bounds(flags)
    steps = recipe.plan(recipe.read(chosen), _resolved(flags), options.effort)
    source = resolve(options.source)
    out = options.out or recipe.default_out(options.source)
    if chosen == "default" and not flags and not bounds.given and (known := recipe.recipes_of(source)):
        log.info("build: what trials choose for this model is known, and takes less time by --recipe %s", " or ".join(known))
    done = recipe.build(source, out, steps, bounds, keep=options.keep_stages == "yes")
    _print_report(done[-1])
    artifact = recipe.shipped_artifact(done)
    print(f"\nartifact: {artifact.path}")
    if artifact.format == "onnx":
        how = "--chat" if has_template(artifact.path) else '"Once upon a time"'
        called = Path(sys.argv[0])  # as .venv/bin/edgepress, by make
        program = shlex.quote(str(called)) if called.name == "edgepress" and not shutil.which("edgepress") else "edgepress"
        print(f"try:      {program} run {shlex.quote(str(artifact.path))} {how}")
    return 0


def _stage(options: argparse.Namespace, flags: Flags) -> int:
    stage = STAGES[options.verb]
    if options.verb == "bench" and options.others:
        named = parts(str(flags["compare_with"])) if "compare_with" in flags else []
        flags = {**flags, "compare_with": [*(str(_onnx(other)) for other in options.others), *named]}
    values = make(stage.options, _resolved(flags))
    source = _source(options)
    artifact = stages.run(options.verb, source, options.out or bench_folder(source.path), values)
    if artifact.format == "report":
        _print_report(artifact)
        return 0
    if options.verb == "prune":
        from edgepress.pipeline.report.influence import influence_table, read_influences

        print(influence_table(read_influences(artifact.path / "influence.json")) + "\n")
    print(artifact.path)
    return 0


def _source(options: argparse.Namespace) -> Artifact:
    """The source of a stage; only import takes a GGUF file as it is, and what takes an artifact takes the OUT of a build, too."""
    if STAGES[options.verb].takes == ("onnx",):
        return Artifact.load(_onnx(options.source))
    return Artifact.load(resolve(options.source)) if options.verb == "import" else stages.source_of(options.source)


def _fetch(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.fetch import fetch

    print(fetch(options.source))
    return 0


def _report(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.report.files import gather, save

    save(gather([folder_of(expanded(source)) for source in options.sources]), options.out)
    print(options.out)
    return 0


def _run(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.runtime.generate import stream

    settings = make(RunOptions, flags)
    if options.prompt in (None, "-") and not settings.chat and not sys.stdin.isatty():
        with contextlib.suppress(OSError):  # nothing to read from
            options.prompt = sys.stdin.read().removesuffix("\n") or None
    if options.prompt is None and not settings.chat:
        raise OptionError("give a text to continue, or --chat for a conversation; see edgepress run --help")
    folder = _onnx(options.source)
    if settings.chat:
        return chat(folder, options.prompt, settings)
    begun, count = time.monotonic(), 0
    for piece in stream(folder, options.prompt, settings):
        if not count:
            begun = time.monotonic()
        print(piece, end="", flush=True)
        count += 1
    print()
    if count > 2:  # the first piece is the prompt, the second waited for it to be read
        say(f"{(count - 2) / (time.monotonic() - begun):.1f} tokens/s")
    elif count < 2 < settings.limit and has_template(folder):
        say("the model ended the text at once; it has a chat template, which --chat applies")
    return 0


def _serve(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.serve.server import serve

    try:
        serve(_onnx(options.source), make(ServeOptions, flags))
    except KeyboardInterrupt:  # as the line said that Ctrl-C would
        interrupt.forget()
    return 0


def _verify(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.verify.checks import verify

    settings = make(VerifyOptions, _resolved(flags))
    folder, states = _onnx(options.source), []
    for check in verify(folder, settings):
        print(one_line(f"{check.state:<12} {check.name}: {check.detail}"), flush=True)
        states.append(check.state)
    if failed := states.count("failed"):
        raise InputError(f"{failed} of {len(states)} checks failed; {folder} should not be used as it is")
    return 0


def _sensitivity(options: argparse.Namespace, flags: Flags) -> int:
    values = make(SensitivityOptions, _resolved(flags))
    folder = stages.source_of(options.source).path
    check_checkpoint(folder, values.trust_remote_code)
    stages.check_beside(options.out, folder)
    _check_file(options.out)
    from edgepress.pipeline.checkpoint.folder import Checkpoint
    from edgepress.pipeline.quantize.sensitivity import measure, table

    sensitivity = measure(Checkpoint(folder, values.trust_remote_code), values)
    write_json(options.out, sensitivity.to_json(folder.name))
    print(table(sensitivity))
    return 0


def _check_file(out: Path) -> None:
    """Raise InputError or OutputError where no file can be written: before minutes of measuring."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"cannot write {out}; give --out a file in a folder that is there")
    if not out.exists():
        check_disk(out, 1)


def _plan(options: argparse.Namespace, flags: Flags) -> int:
    values = make(PlanOptions, _resolved(flags))
    source = stages.source_of(options.source)
    check_checkpoint(source.path, values.trust_remote_code)
    if values.probes is not None:
        from edgepress.pipeline.plan.speed import probes_folder

        folder = probes_folder(source, values, values.probes)
        print(f"{folder}: copy it to the other computer, run there: edgepress machine {shlex.quote(folder.name)}")
        print("and come back with the file that this writes: edgepress plan SRC --machine machine.json")
        return 0
    from edgepress.pipeline.plan.frontier import frontier, table

    print(table(frontier(source, values)))
    return 0


def _machine(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.plan.probes import described, measured_here
    from edgepress.pipeline.report.plain import object_of

    values, folder = make(MachineOptions, flags), expanded(options.source)
    probes = described(folder)
    _check_file(options.out)
    stages.check_beside(options.out, folder)
    write_json(options.out, object_of(measured_here(folder, probes, values.threads)))
    print(options.out)
    return 0


def _sweep(options: argparse.Namespace, flags: Flags) -> int:
    from edgepress.pipeline.sweep.builds import read
    from edgepress.pipeline.sweep.run import PAGE, run, table

    done, content = run(read(options.file), options.out, make(SweepOptions, flags))
    print(table(content, done))
    if content:
        print(f"\nreport:   {options.out / PAGE}")
    if failed := [name for name, end in done.items() if end.failed]:
        raise InputError(f"{len(failed)} of {len(done)} failed, {failed[0]} for one: {done[failed[0]].failed}")
    return 0


def _show(options: argparse.Namespace, flags: Flags) -> int:
    folder = folder_of(expanded(options.source))
    if not folder.is_dir():
        folder = resolve(options.source)
    if not (folder / "manifest.json").is_file() and any(folder.glob("*/model.onnx")):
        folder = _onnx(options.source)
    artifact = Artifact.load(folder)
    if options.recipe:
        from edgepress.pipeline.recipe_of import recipe_text

        print(recipe_text(artifact), end="")
        return 0
    if not artifact.steps:
        check_model_type(folder, read_config(folder))
        what = f"a Hugging Face checkpoint ({artifact.family}), not written by edgepress"
        if (folder / "model.onnx").is_file():
            what = "an ONNX model whose manifest.json is missing, so nothing says how it was made; copy the complete folder"
        print(one_line(f"{folder}: {what}"))
        return 0
    print(one_line(f"{folder}: {artifact.format}, {len(artifact.files)} files"))
    for number, step in enumerate(artifact.steps, 1):
        versions = ", ".join(f"{k} {v}" for k, v in step.versions.items())
        print("\n" + one_line(f"{number}. {step.stage}  ({step.seconds:.1f} s; {versions})"))
        for title, content in (("options", step.options), ("facts", step.facts)):
            print(f"   {title}:")
            for key, value in content.items():
                text = json.dumps(value)
                print(one_line(f"     {key}: {text if len(text) <= 200 else text[:200] + ' ...'}"))
    print("\nfiles:")
    for name, known in artifact.files.items():
        print(f"   {known['bytes']:>12,}  {known['sha256'][:16]}  {name}")
    damaged = artifact.damaged()
    if damaged:
        raise InputError(f"{damaged[0]} is not what the manifest says; build the folder again")
    return 0


COMMANDS = {
    "build": _build,
    "fetch": _fetch,
    "machine": _machine,
    "plan": _plan,
    "report": _report,
    "run": _run,
    "sensitivity": _sensitivity,
    "serve": _serve,
    "show": _show,
    "sweep": _sweep,
    "verify": _verify,
}


def _onnx(source: str) -> Path:
    return onnx_folder(expanded(source))


def _print_report(artifact: Artifact) -> None:
    from edgepress.pipeline.report.model import for_people, read
    from edgepress.pipeline.report.tables import made_by
    from edgepress.pipeline.report.text import terminal

    if artifact.format != "report":
        return
    content = for_people(read(artifact.path / "report.json"))
    print("\n".join(["", *made_by(content.first), "", terminal(content)]))
    print(f"\nreport:   {artifact.path / 'report.md'}")
