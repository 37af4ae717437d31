"""The parent's side of quality: which rows there are, and which stage each loss belongs to; evaluate.py computes the scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.artifact import Step as ArtifactStep
from edgepress.pipeline.bench.answers import Ids, answer, asked
from edgepress.pipeline.bench.evaluate import losses_of
from edgepress.pipeline.bench.jobs import QualityEvent, QualityJob, RowKind, Scored, ScoringRow
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.launch import events
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.checkpoint.shards import rows_of
from edgepress.pipeline.errors import OptionError, WorkerError
from edgepress.pipeline.files import graph_files
from edgepress.pipeline.machine import available_memory
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.options import BenchOptions
from edgepress.pipeline.progress import bar
from edgepress.pipeline.report.attribution import attribute
from edgepress.pipeline.report.model import Figure, StageRow
from edgepress.pipeline.text.windows import beginning, load_tokenizer, same_tokens, text_windows
from edgepress.pipeline.vocabulary import PAST_TENSE

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
Text = tuple[tuple[int, ...], ...]  # windows of token ids


@dataclass(frozen=True)
class Row:
    """A stage to score. exact: name of the row that it must equal but for rounding. failed: why it is not to be tried."""

    name: str
    kind: RowKind
    folder: Path
    identity: str
    exact: str | None = None
    failed: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Rows with the same one have the same scores on the same text: artifacts may share a stage, and one may change nothing."""
        return self.kind, self.identity


@dataclass(frozen=True)
class Failed:
    """Why a row could not be scored."""

    reason: str


Answers = dict[tuple[str, str], Scored | Failed]


def texts(subjects: list[Subject], options: BenchOptions) -> list[Text]:
    """The windows of each subject. Raises TextError for too short a text, OptionError for an original of another tokenizer."""
    result = []
    for subject in subjects:
        cut = text_windows(options.text, subject.path, budget=options.text_tokens, key=options.text_key)
        windows = tuple(tuple(row.tolist()) for row in cut)
        if options.reference is not None:
            _same_tokens(options.reference, subject.path, windows[0])
        result.append(windows)
    return result


def quality(subjects: list[Subject], scored: list[Text], options: BenchOptions, journal: Journal) -> None:
    """Perplexity of every stage behind each subject, KL and top-1 against the original; all read the same tokens.

    The artifact is read from its shipped files with the accuracy level that ships. A row whose process dies is
    marked as failed, and the others go on without it.
    """
    continued = options.reference is not None and _fits(options.reference)  # asked once: memory that is free changes
    plans = [(subject, text, _rows(subject, options)) for subject, text in zip(subjects, scored, strict=True)]
    for text in dict.fromkeys(scored):  # tokenizers and contexts may differ
        alike = [(subject, rows) for subject, other, rows in plans if other == text]
        questions = asked(alike[-1][0].path, text) if continued else {}
        known = _score([row for _, rows in alike for row in rows], text, tuple(questions), continued, options, journal)
        for subject, rows in alike:
            answers = [Failed(row.failed) if row.failed else known[row.key] for row in rows]
            _finish(subject, text, rows, answers, questions, continued, options)


def _finish(
    subject: Subject,
    text: Text,
    rows: list[Row],
    answers: list[Scored | Failed],
    questions: dict[Ids, str],
    continued: bool,
    options: BenchOptions,
) -> None:
    """The stages of a subject, and the figures of its last row, the artifact as it ships. questions: as ``asked`` has them.

    continued: as QualityJob has it.
    """
    text_bytes = _bytes_of(text, subject.path)
    losses = [losses_of(answer) if isinstance(answer, Scored) else None for answer in answers]
    stages = [_stage_row(*parts, text_bytes) for parts in zip(rows, answers, losses, strict=True)]
    if (first := next((loss for loss in losses if loss is not None), None)) is not None:
        warn_unless_readable(float(first.mean()), load_tokenizer(subject.path).get_vocab_size(), options.text)
    subject.rows = attribute(stages, losses, {row.name: row.exact for row in rows if row.exact})
    _shipped(subject, answers[-1], continued, options)
    if isinstance(answers[-1], Scored):
        subject.answers = tuple(answer(subject.path, questions[both.asked], both) for both in answers[-1].answers)


def _stage_row(row: Row, answer: Scored | Failed, loss: np.ndarray | None, text_bytes: int) -> StageRow:
    size = _weights(row.folder)
    if isinstance(answer, Failed) or loss is None:
        return StageRow(row.name, size, failed=answer.reason if isinstance(answer, Failed) else "not scored")
    figures = answer.figures
    return StageRow(
        row.name,
        size,
        perplexity=figures.perplexity,
        tokens=figures.tokens,
        kl_mean=figures.kl_mean,
        kl_p99=figures.kl_p99,
        top1_agreement=figures.top1_agreement,
        bits_per_byte=float(loss.sum(dtype="f8") / math.log(2) / text_bytes) if text_bytes else None,
    )


def _rows(subject: Subject, options: BenchOptions) -> list[Row]:
    """The stages to score, in order."""
    rows: list[Row] = []
    steps: dict[str, tuple[ArtifactStep, ...]] = {}
    for folder in filter(None, (options.reference, *(subject.stages if options.reference else ()))):
        checkpoint = Artifact.load(folder)
        last = checkpoint.steps[-1].stage if rows and checkpoint.steps else ""
        name = PAST_TENSE.get(last, last or folder.name) if rows else "original"
        while name in steps:
            name += "'"
        steps[name] = checkpoint.steps
        rows.append(Row(name, "torch", folder, checkpoint.model_identity()))
    rounds = bool(subject.accuracy_level) or subject.int8_cache  # what the checkpoint does not
    exported_from = next((name for name, s in reversed(steps.items()) if s == subject.artifact.steps[:-1]), None)
    failed = None
    if "speed" in subject.failed:
        failed = f"not tried because the measurement of speed failed: {subject.failed['speed']}"
    equal = None if rounds or subject.half else exported_from
    shipped = Row("onnx", "onnx", subject.path, subject.artifact.identity(), equal, failed)
    if rows and rounds and subject.wide:
        subject.missing["stages.onnx_level_0"] = "left out: slow with 8-bit weights, and proven by the export"
    elif rows and rounds:
        rows.append(replace(shipped, name="onnx_level_0", kind="onnx_level_0", exact=exported_from))
    return [*rows, shipped]


def _score(
    rows: list[Row], text: Text, prompts: tuple[Ids, ...], continued: bool, options: BenchOptions, journal: Journal
) -> Answers:
    """What the measuring process answers for each row, from the journal where it is known. prompts: of what both are asked.

    One process takes all rows, so that the original is loaded and scored once; when it dies, another takes the rest.
    """
    original = None if options.reference is None else Artifact.load(options.reference)
    answers: Answers = {}
    with bar("quality", len(text) * len(_different(rows)), "window") as shown:
        while pending := _different(row for row in rows if row.key not in answers):
            against = original and original.identity()
            what = (against, text, prompts, continued, options.target)
            keys = {journal.key("quality", *key, *what): row for key, row in pending.items()}
            for key, row in keys.items():
                if (known := journal.get(Scored, key)) is not None:
                    answers[row.key] = known
            job = QualityJob(
                windows=text,
                reference=None if original is None else str(original.path),
                rows=tuple(ScoringRow(k, r.kind, str(r.folder)) for k, r in keys.items() if r.key not in answers),
                trust_remote_code=options.trust_remote_code,
                target=options.target,
                asked=prompts,
                continued=continued,
            )
            try:
                for event in events("quality", job, QualityEvent) if job.rows else ():
                    if event.scored:
                        answers[keys[event.scored.key].key] = journal.put(event.scored.key, event.scored)
                    else:
                        shown.update()
            except WorkerError as error:
                dead = next((row for row in pending.values() if row.key not in answers), None)
                if dead is None:  # it died after its last answer
                    break
                answers[dead.key] = Failed(str(error))
                log.warning("warning: the quality of %s (%s) could not be measured: %s", dead.folder, dead.name, error)
                if dead.name == "original":
                    original = None  # the others can still be scored by themselves
    return answers


def _different(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The rows to try, of those with the same scores the first: the original, which is loaded in any case, before its copies."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if not row.failed:
            found.setdefault(row.key, row)
    return found


def _fits(original: Path) -> bool:
    """Whether the original's weights in float32 can be in memory all at once: they are read for each token that it continues."""
    free = available_memory()
    return free is None or 4 * sum(math.prod(row.shape) for row in rows_of(original).values()) <= free


def _shipped(subject: Subject, answer: Scored | Failed, continued: bool, options: BenchOptions) -> None:
    """The artifact's figures, from its row."""
    if isinstance(answer, Failed):
        subject.failed["quality"] = answer.reason
    row = subject.rows[-1]
    matches = answer.figures.greedy_match_tokens if isinstance(answer, Scored) else None
    errors = {"kl_mean": answer.figures.kl_standard_error} if isinstance(answer, Scored) else {}
    for name, unit in UNITS.items():
        values = matches if name == "greedy_match_tokens" else _present(getattr(row, name))
        if values:
            subject.figures[f"quality.{name}"] = Figure.of(unit, values, errors.get(name))
        elif name in COMPARED:
            reason = "no original was given (--reference)" if options.reference is None else "the original or the artifact failed"
            if name == "greedy_match_tokens" and options.reference is not None and not continued:
                reason = "the original does not fit into memory, all of which it reads for every token that it continues"
            subject.missing[f"quality.{name}"] = reason


def _present(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _weights(folder: Path) -> int:
    files = graph_files(folder) or [p for p in folder.iterdir() if p.suffix in (".safetensors", ".onnx", ".data")]
    return sum(p.stat().st_size for p in files)


def _bytes_of(text: Text, folder: Path) -> int:
    """UTF-8 bytes of the scored tokens: all but those that begin a window unscored."""
    tokenizer = load_tokenizer(folder)
    first = max(1, len(beginning(tokenizer)))
    return sum(len(tokenizer.decode(list(row[first:]), skip_special_tokens=False).encode()) for row in text)


def _same_tokens(reference: Path, artifact: Path, window: tuple[int, ...]) -> None:
    """Raise OptionError when the two read text differently: their distributions cannot be compared then."""
    text = load_tokenizer(artifact).decode(list(window))[:2000]
    if not same_tokens(reference, artifact, text):
        raise OptionError(f"{reference} has a different tokenizer from {artifact}; give the checkpoint that it was made from")
