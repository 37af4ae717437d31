"""The stage table, and the one place where a stage is run: skip what is done, write beside, time, describe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.pipeline import interrupt
from edgepress.pipeline.artifact import Artifact, Format, Step, check_free, write_manifest
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.source import hub_origin, resolve
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.files import (
    MANIFEST,
    JsonObject,
    atomic_folder,
    check_disk,
    folder_bytes,
    hub_snapshot,
    is_measurement,
    journal_of,
    real,
    sha256,
)
from edgepress.pipeline.flags import Options, flag
from edgepress.pipeline.lock import writing
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.model_files import belongs_to_a_model
from edgepress.pipeline.options import (
    MIXED,
    MIXTURE,
    OWN_TOKENS,
    SELF,
    WRITTEN,
    BenchOptions,
    ExportOptions,
    HealOptions,
    ImportOptions,
    NarrowOptions,
    PageOptions,
    PruneOptions,
    QuantizeOptions,
    TrimOptions,
    TuneOptions,
    sampler,
)
from edgepress.pipeline.registry import load, versions
from edgepress.pipeline.vocabulary import FORMATS

log = logging.getLogger("edgepress")


@dataclass(frozen=True)
class Stage:
    """One verb: its options, the function behind it, the formats it reads and writes, and what it depends on.

    disk: bytes needed for its output, as a multiple of the source folder's. gives: without ``keep_codes``, see ``format_of``.
    foresee: a function that refuses, before a build begins, options that the stage would refuse late; it is given the folder that
    the build starts from, the options, and how many layers are certain to be removed before.
    """

    options: type[Options]
    run: str
    takes: tuple[Format, ...]
    gives: Format
    packages: tuple[str, ...]
    disk: float
    foresee: str | None = None


_BUILD = ("torch", "transformers", "numpy")
STAGES: dict[str, Stage] = {
    # 4-bit weights become float32
    "import": Stage(
        ImportOptions, "edgepress.pipeline.checkpoint.importers.gguf:import_gguf", ("gguf",), "hf", (*_BUILD, "gguf"), 9.0
    ),
    "trim": Stage(TrimOptions, "edgepress.pipeline.trim.stage:trim", ("hf",), "hf", _BUILD, 1.0),
    "prune": Stage(PruneOptions, "edgepress.pipeline.prune.stage:prune", ("hf",), "hf", _BUILD, 1.0),
    "heal": Stage(HealOptions, "edgepress.pipeline.heal.stage:heal", ("hf",), "hf", (*_BUILD, "peft"), 1.0),
    "narrow": Stage(
        NarrowOptions,
        "edgepress.pipeline.narrow.stage:narrow",
        ("hf",),
        "hf",
        _BUILD,
        1.0,
        "edgepress.pipeline.narrow.stage:foresee",
    ),
    "quantize": Stage(
        QuantizeOptions,
        "edgepress.pipeline.quantize.stage:quantize",
        ("hf", "codes"),
        "packed",
        _BUILD,
        1.0,
        "edgepress.pipeline.quantize.plan:foresee",
    ),
    "tune": Stage(TuneOptions, "edgepress.pipeline.tune.stage:tune", ("packed",), "packed", _BUILD, 1.5),
    # a float export is float32, twice the bytes of a 16-bit checkpoint
    "export": Stage(
        ExportOptions,
        "edgepress.exporters.stage:export",
        ("hf", "codes", "packed"),
        "onnx",
        (*_BUILD, "onnx", "onnx_ir", "onnxruntime"),
        2.2,
        "edgepress.exporters.stage:foresee",
    ),
    "bench": Stage(
        BenchOptions,
        "edgepress.pipeline.bench.stage:bench",
        ("onnx",),
        "report",
        (*_BUILD, "onnxruntime"),
        0.0,
        "edgepress.pipeline.bench.subject:foresee",
    ),
    "page": Stage(PageOptions, "edgepress.pipeline.page.stage:page", ("onnx",), "page", (), 1.2),
}


def format_of(name: str, options: Options) -> Format:
    """The format that a stage gives under these options."""
    return "codes" if isinstance(options, ImportOptions) and options.keep_codes else STAGES[name].gives


def run(name: str, source: Artifact, out: Path, options: Options, *, wait: bool = False) -> Artifact:
    """Run one stage, or return what it gave before if source, options and version are the same.

    wait: for another edgepress that writes ``out``. Raises InputError for a source of the wrong format, OutputError when ``out``
    cannot be written, or another edgepress writes it.
    """
    stage = STAGES[name]
    if source.format not in stage.takes:
        taken, given = " or ".join(FORMATS[format] for format in stage.takes), FORMATS[source.format]
        raise InputError(f"{name} takes {taken}, and {source.path} is {given}; {_hint(source.format, stage.takes)}")
    if source.thinned:
        raise InputError(
            f"the weights of {source.path} are gone (--keep-stages no removes them); build into a new folder without it, and make "
            f"{out} of that"
        )
    if source.format not in ("onnx", "gguf"):
        check_checkpoint(source.path, bool(getattr(options, "trust_remote_code", False)), quantized=name == "export")
    check_outside(out, source.path, *_folders(options))
    if damaged := source.damaged():
        raise InputError(f"{source.path / damaged[0]} was changed since {source.path} was written; build that folder again")
    out = real(out)  # a link to a folder stays one
    with writing(out, wait=wait):
        return _run(name, source, out, options.resolved())


def check_outside(out: Path, *read: Path) -> None:
    """Raise OptionError for an output folder that is one of the folders that are ``read`` for it, the source first.

    However they are written: links count for what they lead to. A folder in one of them may be a new one, or one that edgepress
    wrote; but nothing goes into the hub's cache, whose folders are the hub's.
    """
    place = real(out)
    for number, folder in enumerate(read):
        name = folder if number else f"the source {folder}"
        if _is_in(place, folder) and place.is_dir() and place.samefile(folder):
            raise OptionError(f"{out} is {name}, which is only read; choose another output folder")
        if _is_in(place, folder) and place.is_dir() and any(place.glob("[!.]*")) and not any(_manifests(place)):
            raise OptionError(f"{out} lies in {name} and holds files that edgepress did not write; choose another output folder")
        if (snapshot := hub_snapshot(folder)) and _is_in(place, snapshot.parent.parent):
            raise OptionError(f"{out} lies in the hub's cache, as {name} does, which is only read; choose another output folder")


def check_beside(out: Path, folder: Path) -> None:
    """Raise OptionError for an output file that is, or would be taken for, one of the files of the model in ``folder``."""
    place = real(out)
    own = place.is_file() and not is_measurement(place)
    new = place.parent.is_dir() and place.parent.samefile(folder) and belongs_to_a_model(place.name)
    if new or (own and _is_in(place, folder)):
        raise OptionError(f"{out} is, or would be taken for, a file of the model in {folder}; give --out another name or folder")
    if (snapshot := hub_snapshot(folder)) and _is_in(place, snapshot.parent.parent):
        raise OptionError(f"{out} lies in the hub's cache, as {folder} does, which is only read; give --out another folder")


def _is_in(place: Path, folder: Path) -> bool:
    """Whether a place that need not be there yet is a folder, or lies in it."""
    root = real(folder)
    return root.is_dir() and any(parent.is_dir() and parent.samefile(root) for parent in (real(place), *real(place).parents))


def _manifests(folder: Path) -> Iterator[Path]:
    """Those of a stage's folder, or of the stages in that of a build."""
    return (file for pattern in ("", "*/") for file in folder.glob(pattern + MANIFEST))


def _folders(options: Options) -> list[Path]:
    """The folders that options name, to be read."""
    values = [getattr(options, item.name) for item in dataclasses.fields(options)]
    every = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [value for value in every if isinstance(value, Path) and value.is_dir()]


def _run(name: str, source: Artifact, out: Path, options: Options) -> Artifact:
    """The stage itself, with ``out`` locked."""
    stage, recorded = STAGES[name], record(options)
    inputs = fingerprint(name, options, source)
    if (done := finished(out, inputs)) is not None:
        log.info("%s: already done, kept %s", name, out)
        return done
    check_free(out)
    check_disk(out, int(folder_bytes(source.path) * stage.disk))
    function = load(stage.run)
    log.info("%s: %s -> %s%s", name, source.path, out, ", in place of what was there" if (out / MANIFEST).is_file() else "")
    begun = time.monotonic()
    with atomic_folder(out) as folder:
        facts = function(source, folder, options)
        interrupt.check()
        if origin := hub_origin(source.path):
            facts = facts | {"downloaded": origin}
        seconds = round(time.monotonic() - begun, 2)
        step = Step(name, recorded, facts, seconds, versions(*packages(name, options)))
        write_manifest(folder, format_of(name, options), (*source.steps, step), inputs)
        check_free(out)  # once more: the work may have taken hours
    journal_of(out).unlink(missing_ok=True)
    log.info("%s: done in %.1f s", name, seconds)
    return Artifact.load(out)


def source_of(source: str) -> Artifact:
    """What a user names: a folder, a hub id, "reference"; a GGUF file is imported once, into the cache folder."""
    artifact = Artifact.load(resolve(source))
    if artifact.format != "gguf":
        return artifact
    from edgepress.pipeline.fetch import cache_folder  # it knows of downloads, which --help does without

    folder = cache_folder() / "imports" / f"{artifact.path.stem}-{artifact.identity()[:12]}"
    return run("import", artifact, folder, ImportOptions(), wait=True)  # a folder that nobody chose


def finished(out: Path, fingerprint: str) -> Artifact | None:
    """The artifact in ``out`` if it has this fingerprint and every file is whole."""
    artifact = made(out, fingerprint)
    return None if artifact is None or artifact.damaged() else artifact


def made(out: Path, fingerprint: str) -> Artifact | None:
    """The artifact in ``out`` if it has this fingerprint; no file is read but its manifest."""
    try:
        artifact = Artifact.load(out)
    except InputError:
        return None
    return artifact if artifact.fingerprint == fingerprint else None


def record(options: Options) -> JsonObject:
    """Options as plain data for manifest and fingerprint; a path becomes its name and the hash of its content.

    A text that the model writes is known by how, before it is there.
    """
    for name in ("calibration", "text", "other_text", "keep_text"):
        value = getattr(options, name, None)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, Path) and text not in WRITTEN and text.is_dir():
                raise OptionError(f"{flag(name)} {text} is a folder; give a .txt, .jsonl, .json or .csv file")

    def plain(value: object) -> object:
        if value == SELF:
            return {"self": sampler()}
        if value == MIXED:
            return {"mixed": [sampler(), OWN_TOKENS, MIXTURE, *map(sha256, (CALIBRATION_TEXT, OTHER_TEXT))]}
        if isinstance(value, Path):
            if value.is_dir():
                return {"folder": value.name, "identity": Artifact.load(value).identity()}
            return {"file": value.name, "sha256": sha256(value) if value.is_file() else None}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return {item.name: plain(getattr(options, item.name)) for item in dataclasses.fields(options)}


def packages(name: str, options: Options) -> tuple[str, ...]:
    """The distributions whose versions decide what a stage writes: its own, and its quantization method's."""
    method = METHODS[options.method].packages if isinstance(options, QuantizeOptions) else ()
    return *STAGES[name].packages, *method


def fingerprint(name: str, options: Options, source: Artifact) -> str:
    """Hash of everything that decides what a stage writes."""
    ingredients = [name, record(options), source.identity(), versions(*packages(name, options))]
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _hint(format: Format, taken: tuple[Format, ...]) -> str:
    if format == "hf" and "packed" in taken:
        return "quantize it first"
    if format == "hf" and taken == ("gguf",):
        return "give it to build or to any stage as it is"
    return {
        "gguf": "import it first: edgepress import",
        "hf": "export it first",
        "codes": "quantize or export it, or import the GGUF without --keep-codes",
        "packed": "it is quantized already: export it",
        "onnx": "give the checkpoint that it was made from",
        "report": "give the artifact that it is about",
        "page": "give the artifact that it was made from",
    }[format]
