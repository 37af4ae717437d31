"""The tune stage: what it moves and what it must not, resuming, the guard, and what it refuses to begin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError, ProofError, TextError
from edgepress.pipeline.files import sha256
from edgepress.pipeline.options import QuantizeOptions, TuneOptions
from edgepress.pipeline.own_text.kept import own_text
from edgepress.pipeline.tune import stage, train
from safetensors.numpy import load_file

Make = Callable[..., TuneOptions]


@pytest.fixture(scope="module")
def tuned(quantized: Artifact, tiny: Path, options: Make, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 1024)
        return stages.run("tune", quantized, tmp_path_factory.mktemp("tuned") / "out", options(tiny))


def test_both_texts_are_nearer_and_no_integer_moved(tuned: Artifact, quantized: Artifact) -> None:
    facts = tuned.steps[-1].facts
    for before, after in (facts["held_out_kl"], facts["other_kl"]):
        assert after < 0.95 * before
    former, present = (load_file(a.path / "packed.safetensors") for a in (quantized, tuned))
    assert former.keys() == present.keys()
    for name, array in former.items():
        assert np.array_equal(array, present[name]) is not name.endswith("_proj.scales"), name


def test_norms_learn_in_float32(tuned: Artifact, quantized: Artifact) -> None:
    """A checkpoint of bfloat16 norms would round away nearly all of what they learned."""
    norms = {n: t for n, t in load_file(tuned.path / "model.safetensors").items() if "norm" in n}
    former = load_file(quantized.path / "model.safetensors")
    assert norms and all(t.dtype == np.float32 and not np.array_equal(t, former[n]) for n, t in norms.items())


@pytest.mark.parametrize("saved_at", [7, pytest.param(3, marks=pytest.mark.families)])
def test_an_interrupted_run_ends_with_the_same_bytes(
    saved_at: int, tuned: Artifact, quantized: Artifact, tiny: Path, options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint of the very step, and of an earlier one."""
    save = train._Run.save

    def save_until(self: train._Run, training: train.Training, file: Path) -> None:
        if training.step <= saved_at:
            save(self, training, file)

    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train._Run, "save", save_until)
    steps: list[int] = []
    step_of = train._Run.train_step

    def step(self: train._Run, number: int, rate: float) -> float:
        if len(steps) == 7:
            steps.append(-1)
            raise KeyboardInterrupt
        steps.append(number)
        return step_of(self, number, rate)

    monkeypatch.setattr(train._Run, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        stages.run("tune", quantized, tmp_path / "out", options(tiny))
    assert not (tmp_path / "out").exists()
    again = stages.run("tune", quantized, tmp_path / "out", options(tiny))
    assert steps[steps.index(-1) + 1] == saved_at
    assert [sha256(again.path / f) for f in again.files] == [sha256(tuned.path / f) for f in tuned.files]
    assert not list(tmp_path.glob(".*"))


def test_a_broken_checkpoint_of_the_training_is_begun_anew(tmp_path: Path, quantized: Artifact) -> None:
    student = train.Student(Checkpoint(quantized.path))
    settings = train.Settings(0.01, 1024, 1.0, False)
    run = train._Run(student, train.Lesson([np.arange(64)], None), [], settings)  # type: ignore[arg-type]
    run.save(train.Training(10, 1024, step=3), tmp_path / "training.pt")
    assert run.resumed(tmp_path / "training.pt").step == 3  # type: ignore[union-attr]
    (tmp_path / "training.pt").write_bytes((tmp_path / "training.pt").read_bytes()[:-100])
    assert run.resumed(tmp_path / "training.pt") is None


def test_harm_is_refused(
    quantized: Artifact,
    tiny: Path,
    options: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the training says of itself: worse on one of two texts that it never saw, and the folder stays bit for bit."""
    monkeypatch.setattr(train._Run, "look", lambda self, training: None)  # keeps the last state, not the best
    out = stages.run("tune", quantized, tmp_path / "out", options(tiny, tune_rate=3.0, tune_tokens=2048))
    assert not out.steps[-1].facts["accepted"] and not out.changed
    assert any("did not help both kinds of text" in record.message for record in caplog.records)
    for name in ("packed.safetensors", "model.safetensors"):
        assert sha256(out.path / name) == sha256(quantized.path / name)


@pytest.mark.parametrize("method", ["int8", "none"])
def test_what_lost_little_is_left_as_it_is(method: str, tiny: Path, options: Make, tmp_path: Path) -> None:
    source = stages.run("quantize", Artifact.load(tiny), tmp_path / "q", QuantizeOptions(method=method))
    out = stages.run("tune", source, tmp_path / "out", options(tiny))
    assert "why" in out.steps[-1].facts and not out.changed
    assert sha256(out.path / "packed.safetensors") == sha256(source.path / "packed.safetensors")


@pytest.mark.parametrize(("lost", "rate"), [(0.075, 0.001), (3.0, stage.RATE), (-1e-9, None)])
def test_the_rate_follows_what_was_lost(
    lost: float, rate: float | None, quantized: Artifact, tiny: Path, options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was lost, sums round to less than 0, and there is nothing to train."""
    rates = []

    def taught(student: object, fit: object, selection: object, settings: train.Settings, file: Path) -> None:
        rates.append(settings.learning_rate)
        raise InterruptedError

    monkeypatch.setattr(stage, "_judge", lambda *_: [lost, lost])
    monkeypatch.setattr(stage, "train", taught)
    with nullcontext() if rate is None else pytest.raises(InterruptedError):
        out = stages.run("tune", quantized, tmp_path / "out", options(tiny, tune_rate=None))
        assert out.steps[-1].facts["why"] == "nothing was lost"
    assert rates == ([] if rate is None else [pytest.approx(rate)])


def test_nothing_that_lies_beside_the_checkpoint_is_carried(tiny: Path, options: Make, tmp_path: Path) -> None:
    """As heal: the manifest says what belongs to it."""
    source = stages.run("quantize", Artifact.load(tiny), tmp_path / "q", QuantizeOptions(method="int8"))
    (source.path / "modeling_own.py").write_text("raise SystemExit")
    out = stages.run("tune", source, tmp_path / "out", options(tiny))
    assert out.files.keys() == source.files.keys()


def test_a_code_that_moved_is_caught(
    quantized: Artifact, tiny: Path, options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_of = stage.Student.packed

    def moved(self: stage.Student) -> object:
        packed = packed_of(self)
        linear = next(iter(packed.values()))
        linear.codes.flags.writeable or linear.codes.setflags(write=False)
        codes = linear.codes.copy()
        codes.flat[0] ^= 1
        return packed | {linear.name: stage.packed.replace(linear, codes=codes)}  # type: ignore[attr-defined]

    monkeypatch.setattr(stage.Student, "packed", moved)
    monkeypatch.setattr(stage.packed, "replace", __import__("dataclasses").replace, raising=False)
    with pytest.raises(ProofError, match="the codes of"):
        stages.run("tune", quantized, tmp_path / "out", options(tiny, tune_tokens=4096))
    assert not (tmp_path / "out").exists()


def test_refused_before_the_work(
    quantized: Artifact, tiny: Path, tmp_path: Path, options: Make, random_model: Callable[..., Path], call: Callable[..., Any]
) -> None:
    from families import TINY
    from transformers import LlamaConfig

    with pytest.raises(OptionError, match="--original"):
        stages.run("tune", quantized, tmp_path / "out", options(None))
    other = random_model(LlamaConfig(**TINY | {"vocab_size": 5184}), tmp_path / "other")
    with pytest.raises(OptionError, match="another vocabulary"):
        stages.run("tune", quantized, tmp_path / "out", options(other))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(TextError, match="too short"):
        stages.run("tune", quantized, tmp_path / "out", options(tiny, calibration=short, calibration_tokens=None))
    for flags, message in (
        (("--minutes", "0"), "--minutes must be greater"),
        (("--tune-rate", "0"), "--tune-rate must be greater"),
    ):
        result = call("tune", quantized.path, tmp_path / "out", "--original", tiny, *flags)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
    result = call("tune", tiny, tmp_path / "out", "--original", tiny)
    assert result.code == 2 and "tune takes a quantized checkpoint" in result.err
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*out*"))


@pytest.mark.families
def test_minutes_decide_how_long(quantized: Artifact, tiny: Path, options: Make, tmp_path: Path) -> None:
    out = stages.run("tune", quantized, tmp_path / "out", options(tiny, tune_tokens=None, minutes=0.05))
    assert out.steps[-1].facts["steps"] >= 1


def test_bfloat16_only_where_it_serves(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, window = Checkpoint(tiny).model(), np.arange(1, 60)
    monkeypatch.setattr(stage, "prefers_bfloat16", lambda: False)
    assert not stage._bfloat16_serves(model, window)
    monkeypatch.setattr(stage, "prefers_bfloat16", lambda: True)
    assert stage._bfloat16_serves(model, window)
    monkeypatch.setattr(stage, "NOISE", 0.0)
    assert not stage._bfloat16_serves(model, window)


def test_an_interrupted_training_keeps_its_precision(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is near the edge may be measured otherwise later, and what is learnt from was made before."""
    model, window = Checkpoint(tiny).model(), np.arange(1, 60)
    for faster in (True, False):
        monkeypatch.setattr(stage, "prefers_bfloat16", lambda faster=faster: faster)
        assert stage._precision(model, window, tmp_path / "kept.json")
    assert not stage._precision(model, window, tmp_path / "other.json")


def test_by_default_the_original_writes_what_is_learnt_from(
    quantized: Artifact, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    options = TuneOptions(original=tiny, calibration_tokens=1024, tune_tokens=256)
    facts = stages.run("tune", quantized, tmp_path / "out", options).steps[-1].facts
    assert facts["calibration"]["fit"] == 768
    file = own_text(Checkpoint(tiny), 1024)
    assert facts["calibration"]["sha256"] == sha256(file)


def test_few_tokens_select(tiny: Path, quantized: Artifact, options: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight looks cost more than they bring where each reads all that is held out."""
    monkeypatch.setattr(stage, "SELECTION_TOKENS", 300)
    facts = stages.run("tune", quantized, tmp_path / "out", options(tiny, tune_tokens=256)).steps[-1].facts["calibration"]
    assert facts["selection"] == facts["other_selection"] == 256 < facts["judging"]


def test_attention_is_that_of_before_when_training_ends(quantized: Artifact) -> None:
    model = train.Student(Checkpoint(quantized.path)).model
    former = model.config._attn_implementation
    for bfloat16, within in ((True, "eager"), (False, former)):
        with pytest.raises(KeyboardInterrupt), train._attending_by_matrices(model, bfloat16):
            assert model.config._attn_implementation == within
            raise KeyboardInterrupt
        assert model.config._attn_implementation == former


@pytest.mark.parametrize(("minutes", "tokens", "parameters", "written"), [
    (10, None, 134_515_008, 131072), (2, None, 134_515_008, 32768), (10, None, 494_000_000, 32768), (10, None, 268_000_000, 65536),
    (10, 70_000, 134_515_008, 65536), (10, 256, 14_000_000, 32768), (30, None, 14_000_000, 131072),
])  # fmt: skip
def test_a_longer_training_has_more_text(minutes: float, tokens: int | None, parameters: int, written: int) -> None:
    """Read about once: what is read again and again is learnt by heart, and writing what is not read takes as long."""
    assert TuneOptions(minutes=minutes, tune_tokens=tokens).own_tokens(parameters) == written
