"""What goes to a measuring process and what comes back: one job and one answer for each kind of measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RowKind = Literal["torch", "onnx", "onnx_level_0"]


@dataclass(frozen=True)
class SpeedJob:
    """ids: fixed token ids, at least as many as the longest prompt. threads: 0 leaves the choice to onnxruntime, or to torch.

    dtype: of a checkpoint that plain transformers runs, as torch calls it; None for an artifact.
    """

    folder: str
    ids: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    threads: int
    target: str = "cpu"
    dtype: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SpeedSample:
    """One sample of each figure from one process.

    prefill: prompt length (a key of JSON, hence text) -> seconds up to its first token. load_s in seconds. values: every
    figure that is one number per process, by its name in the report, whose ending gives the unit; None where it is not reported.
    """

    load_s: float
    prefill: dict[str, float]
    inter_token_ms: tuple[float, ...]
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ColdJob:
    """Load with the files out of the page cache."""

    folder: str
    threads: int
    target: str = "cpu"


@dataclass(frozen=True)
class ColdSample:
    """Seconds to load, or the ``reason`` why a cold load could not be measured."""

    load_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BandwidthJob:
    """threads: 0 takes one a core."""

    threads: int


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that the threads read from memory together."""

    bytes_per_s: float


@dataclass(frozen=True)
class Sample:
    """What one round measures of one artifact."""

    speed: SpeedSample
    cold: ColdSample


@dataclass(frozen=True)
class Round:
    """bandwidth: bytes/s, None where it could not be measured. samples: by number of the artifact, none for one that died."""

    bandwidth: float | None = None
    samples: dict[str, Sample] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoringRow:
    """A model to score: a checkpoint in torch, the shipped files, or these at float activations. key: of its answer."""

    key: str
    kind: RowKind
    folder: str


@dataclass(frozen=True)
class QualityJob:
    """Score rows on windows of token ids, against the checkpoint ``reference`` where there is one.

    asked: token ids that both continue, for people to read. continued: whether the original continues anything, which reads all of
    its weights for each token.
    """

    windows: tuple[tuple[int, ...], ...]
    reference: str | None
    rows: tuple[ScoringRow, ...]
    trust_remote_code: bool
    target: str
    asked: tuple[tuple[int, ...], ...] = ()
    continued: bool = True


@dataclass(frozen=True)
class QualityFigures:
    """Quality of one model on the windows; divergences in nats. All after ``tokens`` only with a reference."""

    perplexity: float
    tokens: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_standard_error: float | None = None
    top1_agreement: float | None = None
    greedy_match_tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Continuations:
    """Token ids of what was asked, and with which the original and the artifact continue it, greedily.

    held: how likely the original held its own token where the two part, and the artifact's, 0 for less than 1 %; None where they
    do not part.
    """

    asked: tuple[int, ...]
    original: tuple[int, ...]
    artifact: tuple[int, ...]
    held: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scored:
    """The answer for one row. losses: of every scored token in nats, float32 (tokens,), as base64."""

    key: str
    figures: QualityFigures
    losses: str
    answers: tuple[Continuations, ...] = ()


@dataclass(frozen=True)
class QualityEvent:
    """Another window was scored, or a row is finished."""

    window: int = 0
    scored: Scored | None = None


@dataclass(frozen=True)
class TasksJob:
    """Tasks of lm-evaluation-harness. files: their documents, in the same order, or none; limit: documents of each, 0 for all."""

    folder: str
    tasks: tuple[str, ...]
    files: tuple[str, ...]
    limit: int
    threads: int
    target: str


@dataclass(frozen=True)
class TaskNamesJob:
    """Whether lm-evaluation-harness knows these tasks; with_files: with documents of ours, which a group of tasks cannot have."""

    tasks: tuple[str, ...]
    with_files: bool


@dataclass(frozen=True)
class TaskNames:
    """It knows them."""

    known: tuple[str, ...]


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class TaskFigures:
    """By ``task.metric``."""

    figures: dict[str, TaskFigure]


Job = SpeedJob | ColdJob | BandwidthJob | QualityJob | TasksJob | TaskNamesJob
