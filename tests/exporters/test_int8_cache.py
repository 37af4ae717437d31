"""`export --cache int8`: scales of every channel, a proof of what they cost, and a way back to float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.exporters import int8_cache
from edgepress.exporters.graph.cache import attention, to_float
from edgepress.exporters.proof.recheck import at_level_0
from edgepress.models.families import FAMILIES
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.options import BenchOptions, ExportOptions, QuantizeOptions, VerifyOptions
from edgepress.pipeline.quantize.budget import _scales
from edgepress.pipeline.report.model import read
from edgepress.pipeline.report.tables import made_by
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows
from edgepress.pipeline.verify.checks import verify
from families import family_config

FUSED = sorted(name for name, family in FAMILIES.items() if family.fused)
Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="module")
def both(reference: Path, text: Path, once: Once) -> tuple[Path, Path]:
    """The embedded model with a float cache, and with one of int8; float activations, so that nothing else differs."""
    source = Artifact.load(reference)
    return tuple(
        once(f"cache-{kind}", lambda out, kind=kind: stages.run(
            "export", source, out / "artifact", ExportOptions(accuracy_level="0", cache=kind, text=text)
        )) / "artifact"
        for kind in ("float", "int8")
    )  # type: ignore[return-value]  # fmt: skip


def test_a_quarter_of_the_memory_and_hardly_another_answer(both: tuple[Path, Path], text: Path) -> None:
    """On a trained model: whole, and token by token through the cache; the manifest says what it costs."""
    exact, small = (Decoder(folder) for folder in both)
    assert 4 * small.cache_bytes(100) == exact.cache_bytes(100)
    assert {array.dtype for array in small.cached().values()} == {np.dtype(np.int8)}
    ids = text_windows(text, both[0], budget=96, length=96)[0]
    truth, whole = exact.feed(ids, keep=0), small.feed(ids, keep=0)
    small.reset()
    singly = np.concatenate([small.feed(ids[i : i + 1]) for i in range(len(ids))])
    spread = truth.std()
    assert 0 < np.abs(whole - truth).max() / spread < 0.3 and 0 < np.abs(singly - truth).max() / spread < 0.3
    facts = Artifact.load(both[1]).steps[-1].facts
    assert facts["cache"] == "int8" and -1e-3 < facts["cache_added_kl"] < 2e-3 < facts["max_added_kl"]
    assert [proof["accuracy_level"] for proof in facts["parity"]] == [0, 0]
    assert "cache" not in Artifact.load(both[0]).steps[-1].facts


def test_codes_are_rounded_by_their_channel(both: tuple[Path, Path], text: Path) -> None:
    """The kernel writes what scales of its inputs 12 and 13 say: of the float cache, rounded; nothing of this text is clipped."""
    exact, small = (Decoder(folder) for folder in both)
    ids = text_windows(text, both[0], budget=64, length=64)[0]
    for decoder in (exact, small):
        decoder.feed(ids)
    scales = {name: value.const_value.numpy() for name, value in ir.load(both[1] / "model.onnx").graph.initializers.items()
              if name.endswith(".scale")}  # fmt: skip
    layer, count = _scales(Checkpoint(both[1]).meta_model()), Checkpoint(both[1]).layers  # what --max-size counts
    assert layer * count == sum(scale.nbytes for scale in scales.values())
    name = "past_key_values.0.{}"  # of the first layer, whose inputs are the same in both
    for part in ("key", "value"):
        scale = scales[name.format(part) + ".scale"][0]
        assert scale.shape[1:] == (1, exact.cached()[name.format(part)].shape[-1]) and np.ptp(scale) > 0
        codes = np.round(exact.cached()[name.format(part)] / scale)
        assert np.abs(codes).max() <= 127
        assert np.abs(codes - small.cached()[name.format(part)]).max() <= 1


def test_a_rotated_pair_has_one_scale(both: tuple[Path, Path]) -> None:
    """Further on in a text either channel may hold what both do together: a later position clips no more than an earlier one."""
    largest = int8_cache._largest(both[0], {})  # as if nothing were rotated
    graph = ir.load(both[1] / "model.onnx").graph
    keys = [value.const_value.numpy()[0, :, 0] for name, value in graph.initializers.items() if name.endswith("key.scale")]
    for number, scale in enumerate(keys):
        alone, half = largest[f"past_key_values.{number}.key"] * 1.1 / 127, scale.shape[-1] // 2
        assert np.array_equal(scale[:, :half], scale[:, half:])
        together = alone[:, :half] + alone[:, half:]
        assert (scale >= alone * (1 - 1e-5)).all() and (scale[:, :half] <= together).all()


def test_the_way_back_is_exact(both: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    """At float activations and a float cache the artifact is what it would have been: verify compares that with the checkpoint."""
    graph = ir.load(both[1] / "model.onnx")
    to_float(graph)
    plain = ir.load(both[0] / "model.onnx")
    to_float(plain)  # nothing to do
    for node, other in zip(attention(graph), attention(plain), strict=True):
        assert [value and value.name for value in node.inputs] == [value and value.name for value in other.inputs]
        assert node.attributes.keys() == other.attributes.keys()
    ids = text_windows(text, both[0], budget=64, length=64)[0]
    assert np.array_equal(at_level_0(both[1], tmp_path).feed(ids, keep=0), Decoder(both[0]).feed(ids, keep=0))


@pytest.mark.families
def test_bench_holds_it_to_its_own_promise(both: tuple[Path, Path], reference: Path, text: Path, tmp_path: Path) -> None:
    """What int8 keys and values cost is no damage; with float ones the same weights reproduce the checkpoint."""
    short = {"text_tokens": 256, "repeats": 1, "prompt_lengths": (16,), "new_tokens": 8}
    options = BenchOptions(reference=reference, text=text, original_speed=False, **short)
    report = read(stages.run("bench", Artifact.load(both[1]), tmp_path / "bench", options).path / "report.json").first
    rows = {row.name: row for row in report.stages}
    assert list(rows) == ["original", "onnx_level_0", "onnx"] and not any(row.suspect for row in rows.values())
    assert (rows["onnx_level_0"].token_change_nats or 0) < 1e-4 < (rows["onnx"].token_change_nats or 0)
    assert any(line.endswith("accuracy level 0, float activations, cache of int8") for line in made_by(report))


def test_verify_proves_it_against_the_checkpoint(both: tuple[Path, Path], reference: Path, text: Path) -> None:
    checks = {check.name: check for check in verify(both[1], VerifyOptions(original=reference, text=text))}
    assert all(check.state != "failed" for check in checks.values()), checks
    assert any("as it ships" in check.detail for check in checks.values())


@pytest.mark.families
def test_what_int8_activations_add_is_allowed_as_well(tiny: Path, text: Path, tmp_path: Path) -> None:
    """At level 4, forced or not: verify holds the artifact to what its export found and the cache's own limit."""
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", bits=4, group_size=32))
    made = stages.run("export", packed, tmp_path / "out", ExportOptions(accuracy_level="4", cache="int8", text=text))
    facts = made.steps[-1].facts
    assert facts["max_added_kl"] == pytest.approx(facts["parity"][1]["kl_mean"] - facts["cache_added_kl"] + 0.01)
    assert all(check.state != "failed" for check in verify(made.path, VerifyOptions(original=packed.path, text=text)))


def test_too_much_loss_is_no_artifact(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that clip what there is are refused, and nothing is left behind."""
    monkeypatch.setattr(int8_cache, "MARGIN", 0.02)
    with pytest.raises(ProofError, match=r"a cache in int8 adds KL .*leave --cache out"):
        stages.run("export", Artifact.load(tiny), tmp_path / "out", ExportOptions(cache="int8", text=text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--exporter", "portable"), "--cache int8 is of the fused graph"),
        (("--target", "cuda"), "leave it or --target cuda out"),
        (("--layout", "transformers-js"), "leave it or --layout transformers-js out"),
    ],
)
def test_where_there_is_none(tiny: Path, tmp_path: Path, call: Callable, flags: tuple[str, ...], reason: str) -> None:
    result = call("export", tiny, tmp_path / "out", "--cache", "int8", *flags)
    assert result.code == 2 and reason in result.err and not (tmp_path / "out").exists()


def test_it_runs(both: tuple[Path, Path], call: Callable) -> None:
    """Greedy text of the shipped folder, and the same with guessed tokens, which rewind the cache."""
    plain = call("run", both[1], "The old house stood", "--max-new-tokens", "24", "--lookup", "off")
    guessed = call("run", both[1], "The old house stood", "--max-new-tokens", "24", "--lookup", "auto")
    assert plain.code == guessed.code == 0 and plain.out == guessed.out and len(plain.out.split()) > 8


@pytest.mark.families
@pytest.mark.parametrize("name", FUSED)
def test_every_fused_family_has_it(name: str, random_model: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    """Windows, soft caps, normed keys, layers without positions: proven by the export, batches included."""
    artifact = stages.run(
        "export",
        Artifact.load(random_model(family_config(name), tmp_path / "model")),
        tmp_path / "out",
        ExportOptions(cache="int8", text=text),
    )
    exact, shipped = artifact.steps[-1].facts["parity"]
    assert artifact.steps[-1].facts["cache"] == "int8" and exact["difference_whole"] < 1e-3 < shipped["difference_whole"] < 1
    assert max(shipped[f"difference_{way}"] for way in ("chunks", "steps", "batch")) < 1


def test_a_word_that_is_no_cache() -> None:
    with pytest.raises(OptionError, match="cache"):
        from edgepress.pipeline.flags import make

        make(ExportOptions, {"cache": "int2"})
