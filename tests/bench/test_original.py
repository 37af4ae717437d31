"""The original as people run it: by plain transformers, in the faster of its types, in a few rounds, or left out for a reason."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench import original, speed, worker
from edgepress.pipeline.bench.jobs import ColdSample, SpeedJob, SpeedSample
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.bench.original import original_jobs, result, subject_of
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.bench.torch_decoder import loader
from edgepress.pipeline.errors import WorkerError
from edgepress.pipeline.options import ORIGINAL_ROUNDS, BenchOptions
from transformers import AutoModelForCausalLM

JOB = SpeedJob("artifact", (1, 2, 3), (2,), 4, 0)
PARAMETERS = 13_910_000  # of the embedded model, about


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_transformers_generates(dtype: str, reference: Path) -> None:
    """Read piece by piece with the cache, and again after a reset, in the type that was asked for."""
    ids = torch.arange(5, 37)[None]
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype).eval()
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
    decoder = loader(SpeedJob(str(reference), (), (), 0, 0, dtype=dtype))()
    assert next(decoder._model.parameters()).dtype == getattr(torch, dtype)
    for _ in range(2):
        decoder.reset()
        tokens, piece = [], ids[0].numpy()
        for _ in range(16):
            tokens.append(int(decoder.feed(piece)[-1].argmax()))
            piece = np.array(tokens[-1:])
        assert tokens == expected


def test_threads_are_those_that_were_asked_for(tiny: Path) -> None:
    before = torch.get_num_threads()
    try:
        loader(SpeedJob(str(tiny), (), (), 0, 2, dtype="float32"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class _Waiting:
    """A decoder that waits for something, and takes no time of the processor."""

    def reset(self) -> None:
        pass

    def feed(self, ids: np.ndarray) -> np.ndarray:
        time.sleep(0.005)
        return np.zeros((1, 8), dtype=np.float32)


@pytest.mark.parametrize(("dtype", "threads", "refused"), [("float32", 2, True), ("float32", 1, False), (None, 2, False)])
def test_where_others_are_busy_it_has_no_speed(
    dtype: str | None, threads: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads of torch wait for each other, and it would look far slower than it is; an artifact and one thread do not."""
    monkeypatch.setattr(worker, "_loader", lambda job: _Waiting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with pytest.raises(WorkerError, match="kept the processor busy") if refused else nullcontext():
        (sample,) = worker.speed(replace(JOB, dtype=dtype))
        assert len(sample.inter_token_ms) == JOB.new_tokens


def test_it_may_run_in_float32_and_in_the_type_of_its_weights(tiny: Path, reference: Path) -> None:
    for folder, types in ((tiny, ["float32"]), (reference, ["bfloat16", "float32"])):
        jobs, reason = original_jobs(JOB, BenchOptions(reference=folder, trust_remote_code=True))
        assert [job.dtype for job in jobs] == types and not reason
        assert all(replace(job, dtype=None) == replace(JOB, folder=str(folder), trust_remote_code=True) for job in jobs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reference": None}, "no original was given (--reference)"),
        ({"original_speed": False}, "left out (--no-original-speed)"),
        ({"target": "cuda"}, "on the CPU alone"),
    ],
)
def test_where_it_is_not_run_there_is_a_reason(options: dict[str, object], says: str, reference: Path) -> None:
    jobs, reason = original_jobs(JOB, BenchOptions(**{"reference": reference, **options}))
    assert not jobs and says in reason and result([], [], reason) == reason


def test_one_that_is_quantized_is_not_run(build: Path) -> None:
    jobs, reason = original_jobs(JOB, BenchOptions(reference=build / "03-quantize"))
    assert not jobs and "quantized" in reason


BOTH = ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("free", "types"),
    [(1e9 + 9 * PARAMETERS, BOTH), (1e9 + 6 * PARAMETERS, BOTH[:1]), (1e9, []), (None, BOTH)],
)
def test_memory_bounds_it(free: float | None, types: list[str], reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most half of what is free, where the system tells."""
    monkeypatch.setattr(original, "available_memory", lambda: free)
    jobs, reason = original_jobs(JOB, BenchOptions(reference=reference))
    assert [job.dtype for job in jobs] == types
    assert types or reason == "the original would take about 0.5 GB of memory, and 1.0 are free: more than half"


def in_rounds(
    build: Path, reference: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, ms: dict[str | None, float | None]
) -> tuple[list[str | None], Subject, list[Subject], list[SpeedJob]]:
    """Types in the order of their samples, the artifact, and the original. ms: a token by type; None for one that dies."""
    order: list[str | None] = []

    def measured(kind: str, job: SpeedJob, answer: type) -> object:
        if kind != "speed":
            assert kind == "bandwidth" or getattr(job, "dtype", None) is None
            return ColdSample(reason="none") if kind == "cold" else speed.Bandwidth(1e10)
        order.append(job.dtype)
        if (took := ms[job.dtype]) is None:
            raise WorkerError("killed by the system")
        return SpeedSample(0.1, {"2": 0.2}, (took, took), {"memory.peak_rss_bytes": 1e8})

    monkeypatch.setattr(speed, "measured", measured)
    options = BenchOptions(reference=reference, repeats=5)
    artifact = Subject(Artifact.load(build / "04-export"), "mine", (), ())
    jobs, _ = original_jobs(JOB, options)
    originals = [subject_of(job) for job in jobs]
    speed.speed([artifact, *originals], [JOB, *jobs], options, Journal(journal))
    return order, artifact, originals, jobs


def test_it_takes_turns_with_the_artifact_in_a_few_rounds(
    build: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower type in the first alone; the faster in the first few, A B B A."""
    ms = {None: 1.0, "bfloat16": 20.0, "float32": 10.0}
    order, artifact, originals, jobs = in_rounds(build, reference, tmp_path / "journal", monkeypatch, ms)
    first, second = [None, "float32"], ["float32", None]
    assert order == [None, "bfloat16", "float32", *second, *first, None, None]
    found = result(originals, jobs, "")
    assert not isinstance(found, str) and found.dtype == "float32"
    assert found.figures["speed.decode_tokens_per_s"].values == (100.0,) * ORIGINAL_ROUNDS
    assert len(artifact.figures["speed.decode_tokens_per_s"].values) == 5
    assert found.figures["speed.ttft_ms.2"].median == 200 and "speed.inter_token_ms" not in found.figures


def test_one_that_dies_leaves_the_others(build: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one type it is measured in the other; in both there is a reason, and the artifact has not failed."""
    ms: dict[str | None, float | None] = {None: 1.0, "bfloat16": 20.0, "float32": None}
    _, _, originals, jobs = in_rounds(build, reference, tmp_path / "one", monkeypatch, ms)
    found = result(originals, jobs, "")
    assert not isinstance(found, str) and found.dtype == "bfloat16"
    _, artifact, originals, jobs = in_rounds(build, reference, tmp_path / "both", monkeypatch, ms | {"bfloat16": None})
    assert result(originals, jobs, "") == "plain transformers did not run the original: killed by the system"
    assert not artifact.failed and len(artifact.figures["speed.decode_tokens_per_s"].values) == 5
