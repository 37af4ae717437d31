"""`--rare-rows`: a head of 8 bits whose seldom tokens have 4, written as several operators over one matrix's codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.exporters.proof.accuracy_level import matrix_name
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import LEAST_ROWS, PackedFile, by_bits, with_few_bits
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.metrics.torch_scores import logits_of
from edgepress.pipeline.options import ExportOptions, QuantizeOptions
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.runtime.decoder import Decoder
from families import TINY
from transformers import LlamaConfig

WEIGHT = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
WHERE = [slice(40, 100), slice(150, 200)]


def test_a_matrix_in_parts_is_the_same_matrix() -> None:
    eight = round_to_nearest("m", WEIGHT, 8, 32, True)
    few = round_to_nearest("m", np.concatenate([WEIGHT[rows] for rows in WHERE]), 4, 32, False)
    mixed = with_few_bits(eight, few, WHERE)
    parts = by_bits(mixed)
    assert [(row, part.bits, part.zeros is None) for row, part in parts] == [
        (0, 8, True), (40, 4, False), (100, 8, True), (150, 4, False)
    ]  # fmt: skip
    assert np.array_equal(np.concatenate([part.dequantized() for _, part in parts]), mixed.dequantized())
    assert np.array_equal(mixed.dequantized()[WHERE[0]], few.dequantized()[:60])
    assert np.array_equal(mixed.dequantized()[:40], eight.dequantized()[:40])
    assert mixed.nbytes == eight.rows(slice(0, 90)).nbytes + few.nbytes < eight.nbytes


def test_a_few_rows_of_small_codes_are_no_part() -> None:
    """Rows that happen to have such codes would cost an operator each."""
    eight = round_to_nearest("m", WEIGHT, 8, 32, False)
    some = with_few_bits(eight, round_to_nearest("m", WEIGHT[: LEAST_ROWS - 1], 4, 32, False), [slice(20, 20 + LEAST_ROWS - 1)])
    assert len(by_bits(some)) == 1 and some.nbytes == eight.nbytes
    assert len(by_bits(with_few_bits(eight, round_to_nearest("m", WEIGHT, 4, 32, False), [slice(0, 200)]))) == 1


@pytest.mark.parametrize(
    ("method", "tied", "exporter"),
    [("gptq", True, "fused"), ("rtn", False, "fused"), pytest.param("rtn", True, "portable", marks=pytest.mark.families)],
)
def test_the_artifact_computes_what_the_checkpoint_does(
    method: str, tied: bool, exporter: str, text: Path, tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    """Its head is several operators, its embedding looks in all of their rows, and it is as small as that promises."""
    source = random_model(LlamaConfig(**TINY, tie_word_embeddings=tied), tmp_path / "model")
    rows = Checkpoint(source).config.vocab_size
    options = QuantizeOptions(
        method=method, bits=4, group_size=32, rare_rows=(f"64-{rows // 2 - 1}", f"{rows - 50}-{rows - 1}"), calibration=text,
        calibration_tokens=256,
    )  # fmt: skip
    whole = stages.run("quantize", Artifact.load(source), tmp_path / "whole", QuantizeOptions(method="rtn", bits=4, group_size=32))
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", options)
    assert packed.steps[-1].facts["rare_rows"] == [rows // 2 - 64 + 50, rows]
    name = "model.embed_tokens" if tied else "lm_head"
    linear, eight = PackedFile(packed.path)[name], PackedFile(whole.path)[name]
    assert [part.bits for _, part in by_bits(linear)] == [8, 4, 8, 4]
    assert np.array_equal(linear.codes[:64], eight.codes[:64]) and linear.nbytes < eight.nbytes
    rare = np.r_[64 : rows // 2, rows - 50 : rows]
    weight = Checkpoint(source).tensor(f"{name}.weight").float().numpy()[rare]  # type: ignore[union-attr]
    plain = round_to_nearest("m", weight, 4, 32, False).dequantized()
    error, least = (np.linalg.norm(found - weight) for found in (linear.dequantized()[rare], plain))
    assert 0 < error < 2 * least and (error == least) == (method == "rtn")  # rows in their places

    made = stages.run("export", packed, tmp_path / "onnx", ExportOptions(exporter=exporter, accuracy_level="0", text=text))
    graph = ir.load(made.path / "model.onnx").graph
    heads = [node for node in graph if node.op_type == "MatMulNBits" and node.inputs[1].name.startswith(f"{name}.")]
    assert [node.attributes["bits"].value for node in heads] == [8, 4, 8, 4]
    assert sum(node.op_type == "GatherBlockQuantized" for node in graph) == (4 if tied else 1)
    ids = np.arange(0, rows, 37)
    truth = logits_of(Checkpoint(packed.path).model(), ids)
    logits = Decoder(made.path).feed(ids, keep=0)
    assert np.abs(logits - truth).max() <= 1e-3 * truth.std()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rare_rows": ("12",)}, "takes a range"),
        ({"rare_rows": ("5-2",)}, "is not after"),
        ({"rare_rows": ("²-9",)}, "takes a range"),
        ({"rare_rows": ("5-9", "10-12")}, "with gaps"),
        ({"rare_rows": ("5-9",), "head_bits": 4}, "head of 8 bits"),
        ({"rare_rows": ("5-9",), "max_size": "9MB"}, "leave --head-bits"),
        ({"rare_rows": ("5-9",), "max_growth": 0.05}, "chooses the rare rows"),
    ],
)
def test_ranges_that_say_nothing_are_refused(given: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        QuantizeOptions(method="rtn", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [(("5-999999",), "ends beyond"), (("3-999",), "into 3 parts"), (("64-70",), "into 3 parts")],
)
def test_rows_that_a_head_cannot_store_so_are_refused(given: tuple[str, ...], message: str, tiny: Path, tmp_path: Path) -> None:
    """Else the manifest would tell of bytes that nothing saved."""
    with pytest.raises(OptionError, match=message):
        stages.run("quantize", Artifact.load(tiny), tmp_path / "out", QuantizeOptions(method="rtn", rare_rows=given))
    assert not (tmp_path / "out").exists()


def test_no_rows_at_all_are_asked_for_by_none(tiny: Path, tmp_path: Path) -> None:
    made = stages.run("quantize", Artifact.load(tiny), tmp_path / "out", QuantizeOptions(method="rtn", rare_rows=("none",)))
    assert "rare_rows" not in made.steps[-1].facts
    assert QuantizeOptions(max_size="9MB", rare_rows=("none",)).rare_rows == ("none",)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("lm_head.rows24384", "lm_head"),
        ("model.embed_tokens.matmul.rows64", "model.embed_tokens"),
        ("model.layers.3.self_attn.qkv_proj.rows64", "model.layers.3.self_attn.qkv_proj"),
        ("lm_head", "lm_head"),
        ("model.layers.0.mlp.down_proj.matmul", "model.layers.0.mlp.down_proj"),
        ("transformer.h.0.mlp.2", "transformer.h.0.mlp.2"),
    ],
)
def test_the_parts_of_a_matrix_are_one_to_users(node: str, name: str) -> None:
    assert matrix_name(node) == name
