"""`--calibration self` and `mixed`: written once, kept, and read by every stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ModelError, OptionError, OutputError, TextError
from edgepress.pipeline.files import sha256
from edgepress.pipeline.flags import Options
from edgepress.pipeline.options import MIXED, SELF, HealOptions, PruneOptions, QuantizeOptions, SensitivityOptions, TuneOptions
from edgepress.pipeline.own_text import kept, sampler
from edgepress.pipeline.own_text.kept import own_text, with_text
from edgepress.pipeline.quantize import choose, sensitivity, trials
from edgepress.pipeline.quantize.plan import WINDOW, plan
from edgepress.pipeline.text.windows import ids_of, read_ids, text_windows
from edgepress.pipeline.tune import stage as tune


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes fails the test."""

    def sample(*_: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(sampler, "sample", sample)


def test_written_once(tiny: Path, cache: Path, request: pytest.FixtureRequest) -> None:
    file = own_text(Checkpoint(tiny), 64)
    others = {file, own_text(Checkpoint(tiny), 65), own_text(Checkpoint(tiny), 64, seed=1)}
    assert len(others) == 3 and {*cache.iterdir()} == others
    request.getfixturevalue("silent")
    assert own_text(Checkpoint(tiny), 64) == file


@pytest.mark.parametrize("damage", ["cut short", "changed", "of another length", "no ids"])
def test_a_damaged_file_is_written_anew(damage: str, tiny: Path) -> None:
    file = own_text(Checkpoint(tiny), 64)
    whole, ids = file.read_bytes(), read_ids(file)
    if damage in ("cut short", "changed"):
        middle = len(whole) // 2
        file.write_bytes(
            whole[:middle] if damage == "cut short" else whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        )
    else:
        np.savez_compressed(file, **({"ids": ids[:9]} if damage == "of another length" else {"other": ids}))
    assert np.array_equal(read_ids(own_text(Checkpoint(tiny), 64)), ids) and file.read_bytes() == whole


def test_whole_or_not_at_all(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.np, "savez_compressed", full)
    with pytest.raises(OutputError, match=r"No space left.*EDGEPRESS_CACHE"):
        own_text(Checkpoint(tiny), 64)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("cache", ["below a file", "nobody's home"])
def test_a_text_that_cannot_be_kept_is_used(
    cache: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A default build asks for none of it: it is written once for this process, and that is said in a line."""
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(kept, "_unkept", [])
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "file") if cache == "below a file" else "~no-such-user/cache")
    with caplog.at_level("INFO", "edgepress"):
        file = own_text(Checkpoint(tiny), 64)
        assert own_text(Checkpoint(tiny), 64) == file and len(read_ids(file)) == 64
    assert file.parent == kept._unkept[0] and (tmp_path / "file").read_text() == "kept"
    assert [record.message for record in caplog.records if "is not kept in the cache folder" in record.message]
    assert sum("writes 64 tokens" in record.message for record in caplog.records) == 1
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_whatever_decides_what_is_written_makes_another_file(changed: str, tiny: Path, copy_of: Callable[..., Path]) -> None:
    folder = copy_of(tiny)
    before = kept._key(folder, 64, 0)
    with (folder / changed).open("ab") as file:
        file.write(b" ")
    assert kept._key(folder, 64, 0) != before


@pytest.mark.families
def test_every_stage_of_a_build_is_told_who_writes(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The original, also once layers are gone."""
    told: dict[str, Options] = {}

    def run(name: str, source: Artifact, out: Path, options: Options) -> Artifact:
        told[name] = options
        return source

    monkeypatch.setattr(recipe.stages, "run", run)
    steps = {"prune": {"remove_count": 1}, "heal": {}, "quantize": {}}
    recipe.build(tiny, tmp_path / "out", recipe.plan(steps, {"calibration": "self"}))
    assert [told[name].calibration_model for name in steps] == [tiny] * 3
    recipe.build(tiny, tmp_path / "out", recipe.plan(steps, {}))
    assert [told[name].calibration_model for name in steps] == [None, None, tiny]


def test_prune_heal_and_quantize_read_one_text(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself prune reads what SRC writes, heal what --original writes, quantize what it is told."""
    monkeypatch.setattr("edgepress.pipeline.text.calibration.OTHER_TEXT_TOKENS", 1600)
    options = {"calibration": SELF, "calibration_tokens": 512}
    pruned = stages.run("prune", Artifact.load(tiny), tmp_path / "pruned", PruneOptions(remove_layers=(1,), **options))
    healed = stages.run("heal", pruned, tmp_path / "healed", HealOptions(original=tiny, **options))
    (file,) = cache.iterdir()
    assert {artifact.steps[-1].facts["calibration"]["sha256"] for artifact in (pruned, healed)} == {sha256(file)}
    given, checkpoint = QuantizeOptions(calibration_model=tiny, **options), Checkpoint(pruned.path)
    job, seen = plan(checkpoint, checkpoint.meta_model(), given, tmp_path / "scratch")
    assert not seen.windows and not seen.text
    assert np.array_equal(job.windows()[1], text_windows(file, tiny, budget=512, length=WINDOW)[1])
    assert len(seen.windows) == 8 and seen.text == "self"
    assert {*cache.iterdir()} == {file} and with_text(replace(given, calibration_model=None), pruned.path).calibration != file


def test_whatever_else_calibrates_reads_it_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of bits, sensitivity, and tune, which takes what --original writes."""
    monkeypatch.setattr(trials, "COST_TOKENS", 512)
    file, read = own_text(Checkpoint(tiny), 512), []

    def reads(path: Path, *_: object, **__: object) -> None:
        read.append(path)
        raise TextError("enough")

    options = {"calibration": SELF, "calibration_tokens": 512}
    for module in (trials, sensitivity):
        monkeypatch.setattr(module, "text_windows", reads)
    monkeypatch.setattr(tune, "healing_sets", lambda folder, options, *_: reads(options.calibration))
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn"))
    for run in (
        lambda: choose.choose(Artifact.load(tiny), QuantizeOptions(max_growth=0.1, **options | {"calibration_tokens": 64})),
        lambda: sensitivity.measure(Checkpoint(tiny), SensitivityOptions(**options)),
        lambda: tune.tune(packed, tmp_path / "tuned", TuneOptions(original=tiny, **options)),
    ):
        with pytest.raises(TextError, match="enough"):
            run()
    assert read == [file] * 3


@pytest.mark.parametrize("reads", [True, False])
def test_a_mixed_text_has_all_kinds_by_turns(reads: bool, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the beginning of it is mixed, too, where fewer tokens are asked for; technical prose if the model reads it."""
    monkeypatch.setattr(kept, "OWN_TOKENS", 2000)
    monkeypatch.setattr(kept, "_read", {})
    asked: list[float] = []
    monkeypatch.setattr(kept, "readable", lambda loss, size: asked.append(loss / np.log(size)) or reads)
    tokenizer = Checkpoint(tiny).tokenizer
    parts = [
        np.array(ids_of(CALIBRATION_TEXT, tokenizer, 2000)[:2000]),
        read_ids(own_text(Checkpoint(tiny), 2000)),
        np.array(ids_of(OTHER_TEXT, tokenizer, 2000)[:2000]),
    ][: 2 + reads]
    before = {*cache.iterdir()}
    file = with_text(QuantizeOptions(calibration=MIXED), tiny).calibration
    ids = read_ids(file)
    assert {*cache.iterdir()} - before == {file} and len(ids) == sum(map(len, parts))
    for first in range(0, 2000, 256):
        for part in parts:
            turn, ids = ids[: len(part[first : first + 256])], ids[len(part[first : first + 256]) :]
            assert np.array_equal(turn, part[first : first + 256])
    assert with_text(QuantizeOptions(calibration=MIXED), tiny).calibration == file
    # what a tune stage follows is compared with what none follows
    assert with_text(QuantizeOptions(calibration=MIXED, tuned=True), tiny).calibration == file
    assert len(asked) == 1 and 0.9 < asked[0] < 1.1  # once a model, and its weights are random


@pytest.mark.usefixtures("silent")
def test_what_each_matrix_costs_is_measured_on_shipped_texts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model writes adds nothing to them (docs/calibration.md); a text that is given is read as it is."""
    monkeypatch.setattr(kept, "readable", lambda *_: True)
    monkeypatch.setattr(kept, "_read", {})
    both = with_text(QuantizeOptions(), tiny, shipped=True).calibration
    texts = [ids_of(text, Checkpoint(tiny).tokenizer, 512)[:256] for text in (CALIBRATION_TEXT, OTHER_TEXT)]
    assert np.array_equal(read_ids(both)[:512], np.concatenate(texts))
    read = []

    def reads(path: Path, *_: object, **__: object) -> None:
        read.append(path)
        raise TextError("enough")

    for options in (PruneOptions(remove_count=1, calibration=MIXED), HealOptions(calibration=MIXED, original=tiny)):
        assert with_text(options, tiny, shipped=True).calibration == CALIBRATION_TEXT  # technical prose judges them
    for module in (trials, sensitivity):
        monkeypatch.setattr(module, "text_windows", reads)
    for calibration in (MIXED, CALIBRATION_TEXT):
        trial = object.__new__(trials.Trial)
        trial.options = trial._resolved = QuantizeOptions(calibration=calibration)
        trial.path, trial.context = tiny, 512
        with pytest.raises(TextError, match="enough"):
            trial.items()
        with pytest.raises(TextError, match="enough"):
            sensitivity.measure(Checkpoint(tiny), SensitivityOptions(calibration=calibration))
    assert read == [both, both, CALIBRATION_TEXT, CALIBRATION_TEXT]


def test_a_model_that_does_not_fit_into_memory_writes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept, "OWN_TOKENS", 2000)
    weights = 4 * Checkpoint(tiny).meta_model().num_parameters()
    monkeypatch.setattr(kept, "available_memory", lambda: 2 * weights - 1)
    assert with_text(QuantizeOptions(), tiny).calibration == CALIBRATION_TEXT
    assert "the shipped texts alone calibrate" in caplog.text and "GB that are free" in caplog.text
    job, seen = plan(Checkpoint(tiny), Checkpoint(tiny).meta_model(), QuantizeOptions(calibration_tokens=64), tmp_path / "scratch")
    job.windows()
    assert seen.text == CALIBRATION_TEXT.name  # and so says the manifest
    with monkeypatch.context() as patch:
        patch.setattr(kept, "readable", lambda *_: True)
        patch.setattr(kept, "_read", {})
        shipped = read_ids(with_text(QuantizeOptions(), tiny).calibration)
        job.windows()
        assert seen.text == "calibration.txt and technical.txt"
        texts = [ids_of(text, Checkpoint(tiny).tokenizer, 512)[:256] for text in (CALIBRATION_TEXT, OTHER_TEXT)]
        assert np.array_equal(shipped[:512], np.concatenate(texts))
    for enough in (2 * weights, None, 1000):  # what is written already takes no memory
        monkeypatch.setattr(kept, "available_memory", lambda enough=enough: enough)
        assert kept.is_written(with_text(QuantizeOptions(), tiny).calibration)
    job.windows()
    assert seen.text == "mixed"


def test_the_prose_is_left_where_a_model_makes_no_text(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("its logits are not finite")

    monkeypatch.setattr(sampler, "sample", fail)
    assert with_text(QuantizeOptions(), tiny).calibration == CALIBRATION_TEXT
    assert "not finite" in caplog.text
    with pytest.raises(ModelError):
        with_text(QuantizeOptions(calibration=SELF), tiny)


def test_the_seed_of_quantize_is_that_of_the_text(tiny: Path) -> None:
    options = QuantizeOptions(calibration=SELF, calibration_tokens=64)
    files = {with_text(replace(options, calibration_seed=seed), tiny).calibration for seed in (None, 0, 1)}
    assert len(files) == 2


@pytest.mark.usefixtures("silent")
def test_a_stage_that_is_done_samples_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its fingerprint knows how the text is made: by which sampler, from which prompts, by which model."""
    artifact = Artifact.load(tiny)
    shipped = PruneOptions(remove_count=1)
    first = stages.fingerprint("prune", replace(shipped, calibration=SELF), artifact)
    assert first == stages.fingerprint("prune", replace(shipped, calibration=SELF), artifact)
    mixed = stages.fingerprint("prune", replace(shipped, calibration=MIXED), artifact)
    assert len({first, mixed, stages.fingerprint("prune", shipped, artifact)}) == 3
    monkeypatch.setattr("edgepress.pipeline.options.PROMPTS", tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("Why?\n")
    assert first != stages.fingerprint("prune", replace(shipped, calibration=SELF), artifact)


def test_a_recipe_may_say_self(tmp_path: Path) -> None:
    """The word is no file beside the recipe."""
    (tmp_path / "r.yaml").write_text(
        "prune: {remove_count: 1, calibration: self}\nheal: {calibration: mixed}\nquantize: {calibration: other.txt}\n"
    )
    (_, prune), (_, heal), (_, quantize) = recipe.plan(recipe.read(str(tmp_path / "r.yaml")), {})
    assert (prune.calibration, heal.calibration, quantize.calibration) == (SELF, MIXED, tmp_path / "other.txt")


def test_who_writes_is_said_only_of_a_text_that_is_written(call: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text.")
    for verb in ("prune", "heal", "quantize", "sensitivity"):
        where = ("--out", tmp_path / "out") if verb == "sensitivity" else (tmp_path / "out",)
        result = call(verb, tiny, *where, "--calibration-model", tiny, "--calibration", tmp_path / "text.txt")
        assert result.code == 2 and "--calibration self" in result.err and result.err.count("\n") == 1


def test_another_tokenizer_cannot_write(tiny: Path, copy_of: Callable[..., Path]) -> None:
    folder = copy_of(tiny)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5120, "content": "<|more|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(OptionError, match="another tokenizer"):
        with_text(PruneOptions(remove_count=1, calibration=SELF, calibration_model=folder), tiny)
