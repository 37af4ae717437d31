"""The parent's side of quality: which rows there are, which are known already, and which stage each loss belongs to."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.evaluate import losses_of
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.process import events
from edgepress.pipeline.checkpoint.source import check_checkpoint
from edgepress.pipeline.errors import OptionError, WorkerError
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import bar
from edgepress.pipeline.report.attribution import attribute
from edgepress.pipeline.report.stats import Measurement
from edgepress.pipeline.text.windows import beginning, load_tokenizer, text_windows
from edgepress.pipeline.vocabulary import PAST_TENSE

if TYPE_CHECKING:
    from edgepress.pipeline.bench.subject import Subject


log = logging.getLogger("edgepress")
UNITS = {
    "perplexity": "1",
    "bits_per_byte": "bit/byte",
    "kl_mean": "nat",
    "kl_p99": "nat",
    "top1_agreement": "1",
    "greedy_match_tokens": "token",
    "tokens": "token",
}
COMPARED = ("kl_mean", "kl_p99", "top1_agreement", "greedy_match_tokens")


def check_references(options: BenchOptions) -> None:
    """Before anything is measured: every checkpoint named is there and can be read."""
    if options.stages and options.reference is None:
        raise OptionError("--stages are measured against the original; give it with --reference")
    for folder in (options.reference, *options.stages):
        if folder is not None:
            check_checkpoint(Artifact.load(folder).path, options.trust_remote_code, quantized=True)


Text = list[list[int]]  # windows of token ids


def texts(subjects: list[Subject], options: BenchOptions) -> list[Text]:
    """What each subject will be scored on. Raises TextError for too short a text, OptionError for another tokenizer's original."""
    found = []
    for subject in subjects:
        windows = [row.tolist() for row in text_windows(options.text, subject.path, budget=options.text_tokens)]
        if options.reference is not None:
            _same_tokens(options.reference, subject.path, windows[0])
        found.append(windows)
    return found


def quality(subjects: list[Subject], scored: list[Text], options: BenchOptions, journal: Journal) -> None:
    """Perplexity of every stage behind each subject, KL and top-1 against the original; all read the same tokens.

    The artifact is read from its shipped files with the accuracy level that ships. A row whose process dies is
    marked "failed", and the others go on without it.
    """
    plans = [(subject, text, _rows(subject, options)) for subject, text in zip(subjects, scored, strict=True)]
    for text in {json.dumps(text): text for _, text, _ in plans}.values():  # tokenizers and contexts may differ
        _answer([row for _, own, rows in plans if own == text for row in rows], text, options, journal)
    for subject, text, rows in plans:
        _finish(subject, text, rows, options)


def _finish(subject: Subject, text: Text, rows: list[dict[str, Any]], options: BenchOptions) -> None:
    text_bytes = _bytes_of(text, subject.path)
    answers = [row.pop("answer") for row in rows]
    losses = [losses_of(a) if "losses" in a else None for a in answers]
    for row, answer, loss in zip(rows, answers, losses, strict=True):
        row |= {k: v for k, v in answer.get("figures", {}).items() if not isinstance(v, list)}
        if loss is not None and text_bytes:
            row["bits_per_byte"] = float(loss.sum(dtype="f8") / math.log(2) / text_bytes)
        if "failed" in answer:
            row["failed"] = answer["failed"]
    attribute(rows, losses)
    subject.rows = [{k: v for k, v in row.items() if k not in ("folder", "kind", "identity", "exact")} for row in rows]
    _shipped(subject, rows[-1], answers[-1].get("figures", {}), options)


def _rows(subject: Subject, options: BenchOptions) -> list[dict[str, Any]]:
    """The stages to score, in order. exact: name of the row that a row must equal but for rounding."""
    rows: list[dict[str, Any]] = []
    steps: dict[str, Any] = {}
    for folder in filter(None, (options.reference, *(subject.stages if options.reference else ()))):
        known = Artifact.load(folder)
        last = known.steps[-1].stage if rows and known.steps else ""
        name = PAST_TENSE.get(last, last or folder.name) if rows else "original"
        while name in steps:
            name += "'"
        steps[name] = known.steps
        rows.append({"name": name, "kind": "torch", "folder": str(folder), "identity": known.identity()})
    level = subject.fact("accuracy_level")
    own: dict[str, Any] = {"folder": str(subject.path), "identity": subject.artifact.identity()}
    if "speed" in subject.failed:
        own["answer"] = {"failed": f"not tried, for the measurement of speed ended so: {subject.failed['speed']}"}
    if rows and level:
        rows.append({"name": "onnx_level_0", "kind": "onnx_level_0"} | own)
    rows.append({"name": "onnx", "kind": "onnx"} | own)
    exported_from = next((n for n, s in reversed(steps.items()) if s == subject.artifact.steps[:-1]), None)
    for row in rows:
        float_activations = row["kind"] == "onnx_level_0" or (row["kind"] == "onnx" and level == 0)
        row["exact"] = exported_from if float_activations else None
        row["bytes"] = _weights(Path(row["folder"]))
    return rows


def _answer(rows: list[dict[str, Any]], text: Text, options: BenchOptions, journal: Journal) -> None:
    """Set the "answer" of each row: what the measuring process says of it, from the journal where it is known.

    One process takes all rows, so that the original is loaded and scored once; when it dies, another takes the rest.
    """
    original = None if options.reference is None else Artifact.load(options.reference)
    with bar("quality", len(text) * len(rows), "window") as shown:
        while pending := [row for row in rows if "answer" not in row]:
            against = original and original.identity()
            keys = [journal.key("quality", row["kind"], row["identity"], against, text, options.target) for row in pending]
            wanted = dict(zip(keys, pending, strict=True))  # several artifacts may share a stage
            answers = {key: found for key in wanted if (found := journal.get(key)) is not None}
            job = {
                "windows": text,
                "reference": None if original is None else str(original.path),
                "rows": [{"key": k, "kind": r["kind"], "folder": r["folder"]} for k, r in wanted.items() if k not in answers],
                "trust_remote_code": options.trust_remote_code,
                "target": options.target,
            }
            try:
                for event in events("quality", job) if job["rows"] else ():
                    if "key" in event:
                        answers[event["key"]] = journal.put(event["key"], event)
                    else:
                        shown.update()
            except WorkerError as error:
                dead = next(key for key in wanted if key not in answers)
                answers[dead] = {"failed": str(error)}
                name = wanted[dead]["name"]
                log.warning("warning: the quality of %s (%s) could not be measured: %s", wanted[dead]["folder"], name, error)
                if name == "original":
                    original = None  # the others can still be scored by themselves
            for key, row in zip(keys, pending, strict=True):
                if key in answers:
                    row["answer"] = answers[key]


def _shipped(subject: Subject, row: dict[str, Any], figures: dict[str, Any], options: BenchOptions) -> None:
    """The artifact's own figures, from its row."""
    if "failed" in row:
        subject.failed["quality"] = row["failed"]
    for name, unit in UNITS.items():
        if name in figures or name in row:
            values: Any = figures.get(name, row.get(name))
            subject.figures[f"quality.{name}"] = Measurement(unit, values if isinstance(values, list) else [values])
        elif name in COMPARED:
            subject.missing[f"quality.{name}"] = (
                "no original was given (--reference)" if options.reference is None else "the original or the artifact failed"
            )


def _weights(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".onnx", ".data"))


def _bytes_of(text: Text, folder: Path) -> int:
    """UTF-8 bytes of the scored tokens: all but those that begin a window unscored."""
    tokenizer = load_tokenizer(folder)
    first = max(1, len(beginning(tokenizer)))
    return sum(len(tokenizer.decode(row[first:], skip_special_tokens=False).encode()) for row in text)


def _same_tokens(reference: Path, artifact: Path, window: list[int]) -> None:
    """Raise OptionError when the two read text differently: their distributions cannot be compared then."""
    text = load_tokenizer(artifact).decode(window)[:2000]
    if load_tokenizer(reference).encode(text).ids != load_tokenizer(artifact).encode(text).ids:
        raise OptionError(f"{reference} has another tokenizer than {artifact}; give the checkpoint that it was made from")
