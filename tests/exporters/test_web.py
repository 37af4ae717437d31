"""The graph for browsers: the quantizer's codes in operators that WebAssembly has, times activations of two bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from edgepress.exporters.graph.web import WebBuilder
from edgepress.exporters.proof.parity import TOLERANCE, TOLERANCE_HALF
from edgepress.pipeline import recipe, stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.jobs import SpeedJob
from edgepress.pipeline.bench.original import original_jobs
from edgepress.pipeline.bench.quality import _rows
from edgepress.pipeline.bench.subject import Subject
from edgepress.pipeline.checkpoint.packed import PackedFile
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import WEB, BenchOptions, ExportOptions, QuantizeOptions, VerifyOptions
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.report.model import read
from edgepress.pipeline.verify.checks import verify
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, Qwen3Config

ROWS = QuantizeOptions(method="rtn", bits=8, group_size=-1)
# Operators of onnxruntime's that its WebAssembly build lacks, or is slow with.
NOT_THERE = {"GatherBlockQuantized", "MatMulNBits", "MatMulBnb4"}
_QWEN = {
    "vocab_size": 5122, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {
    "tied, fused": Qwen3Config(**_QWEN),
    "untied, fused": Qwen3Config(**_QWEN | {"tie_word_embeddings": False}),
    "portable": GPT2Config(vocab_size=5122, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0),
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(
    request: pytest.FixtureRequest, random_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Artifact]:
    """The packed checkpoint and the artifact."""
    folder = tmp_path_factory.mktemp("web")
    source = Artifact.load(random_model(CONFIGS[request.param], folder / "model"))
    packed = stages.run("quantize", source, folder / "packed", ROWS)
    return packed, stages.run("export", packed, folder / "onnx", ExportOptions(target=WEB, text=text))


def test_the_codes_are_the_quantizers(exported: tuple[Artifact, Artifact]) -> None:
    packed, artifact = exported
    graph = ir.load(artifact.path / "onnx" / "model_quantized.onnx").graph
    kinds = {node.op_type for node in graph}
    assert "MatMulInteger" in kinds and not kinds & NOT_THERE
    found = {name: value.const_value.numpy() for name, value in graph.initializers.items() if name.endswith(".codes")}
    wanted = {name: linear.unpacked() for name, linear in PackedFile(packed.path).items()}
    assert sum(codes.size for codes in found.values()) == sum(codes.size for codes in wanted.values())
    whole = {name: np.concatenate([wanted[part] for part in _parts(name.removesuffix(".codes"), wanted)]).T for name in found}
    for name, codes in found.items():
        assert np.array_equal(codes, whole[name]), name


def _parts(name: str, wanted: dict[str, np.ndarray]) -> list[str]:
    """The matrices that one operator multiplies by."""
    if name in wanted:
        return [name]
    stem, _, kind = name.rpartition(".")
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}[kind]
    return [f"{stem}.{part}" for part in parts]


def test_it_computes_what_the_checkpoint_does(exported: tuple[Artifact, Artifact]) -> None:
    """To what sixteen bits allow: the proof of the export, and the same of a finished artifact."""
    packed, artifact = exported
    facts = artifact.steps[-1].facts
    assert (facts["target"], facts["activations"], facts["accuracy_level"]) == (WEB, "int16", 0)
    (proof,) = facts["parity"]
    assert proof["kl_mean"] < 1e-7 and proof["difference_whole"] < 2e-3 and proof["difference_batch"] < 2e-3
    assert read_json(artifact.path / "config.json")["transformers.js_config"]["dtype"] == "q8"
    checks = list(verify(artifact.path, VerifyOptions(original=packed.path)))
    assert {check.state for check in checks} == {"ok"}, checks


def test_a_token_of_large_values_leaves_the_others_their_scale() -> None:
    """One scale for all tokens would round the small ones to a few steps; a token of zeros stays one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    x[0, 0] *= 1e4
    x[1, 2] = 0
    builder = WebBuilder()
    given = builder.input("x", ir.DataType.FLOAT, ["batch", "tokens", 8])
    linear = round_to_nearest("m", rng.normal(size=(5, 8)).astype(np.float32), 8, -1, symmetric=False)
    builder.output(builder.linear(given, linear, "m", 4), "y", ir.DataType.FLOAT, ["batch", "tokens", 5])
    session = onnxruntime.InferenceSession(ir.to_proto(builder.model({})).SerializeToString())
    (y,) = session.run(None, {"x": x})
    truth = x @ linear.dequantized().T
    largest = np.abs(x).max(-1, keepdims=True)
    assert np.all(np.abs(y - truth) <= largest * np.abs(linear.dequantized()).sum(-1) / 32000)
    assert np.all(y[1, 2] == 0)
    (alone,) = session.run(None, {"x": x[1:, 1:2]})
    assert np.array_equal(alone[0, 0], y[1, 1])


def test_a_float_checkpoint_stays_float(tiny: Path, text: Path, tmp_path: Path) -> None:
    artifact = stages.run("export", Artifact.load(tiny), tmp_path / "onnx", ExportOptions(target=WEB, text=text))
    facts = artifact.steps[-1].facts
    assert facts["activations"] == "float32" and facts["parity"][0]["flipped"] == 0
    assert read_json(artifact.path / "config.json")["transformers.js_config"]["dtype"] == "fp32"


def test_one_large_value_among_small_ones_is_no_damage(random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """As real models have them: the small ones lose more than the order of additions changes, and that is what 16 bits allow."""
    source = random_model(CONFIGS["tied, fused"], tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] *= 100
    weights["model.layers.0.mlp.down_proj.weight"][:, 0] = 0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    packed = stages.run("quantize", Artifact.load(source), tmp_path / "packed", ROWS)
    artifact = stages.run("export", packed, tmp_path / "onnx", ExportOptions(target=WEB, text=text))
    assert TOLERANCE < artifact.steps[-1].facts["parity"][0]["difference_whole"] < TOLERANCE_HALF
    assert {check.state for check in verify(artifact.path, VerifyOptions(original=packed.path))} == {"ok"}


def test_rows_whose_sums_would_overflow_are_refused() -> None:
    builder = WebBuilder()
    x = builder.input("x", ir.DataType.FLOAT, ["batch", "tokens", 65_794])
    linear = round_to_nearest("m", np.ones((1, 65_794), np.float32), 8, -1, symmetric=True)
    with pytest.raises(OptionError, match="m is 65794 wide, and 65793 are the most; leave --target web out"):
        builder.linear(x, linear, "m", 4)


@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(method="rtn", bits=4, group_size=32),
        QuantizeOptions(method="rtn", bits=8, group_size=32),
        QuantizeOptions(method="nf4"),
    ],
    ids=["4 bits", "blocks of 32", "nf4"],
)
def test_other_codes_are_refused(options: QuantizeOptions, tiny: Path, text: Path, tmp_path: Path) -> None:
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", options)
    with pytest.raises(OptionError, match=r"--target web needs codes of 8 bits .* --method rtn --bits 8 --group-size -1"):
        stages.run("export", packed, tmp_path / "onnx", ExportOptions(target=WEB, text=text))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"bits": 4}, "8 bits and one scale a row"),
        ({"group_size": 32}, "8 bits and one scale a row"),
        ({"head_bits": 4}, "8 bits and one scale a row"),
        ({"method": "gptq"}, "8 bits and one scale a row"),
        ({"bits_for": (".*o_proj=8/64",)}, "8 bits and one scale a row"),
        ({"max_growth": 0.05}, "8 bits and one scale a row"),
        ({"method": "int8"}, "8 bits and one scale a row"),  # its head has blocks
        ({"accuracy_level": "4"}, "int8 activations are CPU-only, and the target is web"),
        ({"exact_layers": "4"}, "leave it out for --target web"),
        ({"cache": "int8"}, "leave it or --target web out"),
    ],
)
def test_a_build_refuses_what_no_browser_runs(flags: dict[str, object], said: str) -> None:
    """Before it begins."""
    assert recipe.recipe_for("model", {"target": WEB}) == "web"
    with pytest.raises(OptionError, match=said):
        recipe.plan(recipe.read("web"), {"target": WEB, **flags})


def test_the_codes_of_a_gguf_have_blocks() -> None:
    with pytest.raises(OptionError, match="--keep-codes would give others"):
        recipe.plan(recipe.read("codes"), {"target": WEB, "bits": 8, "group_size": -1})


def test_a_build_for_browsers_takes_what_fits() -> None:
    given = recipe.read("web")
    for flags in ({}, {"method": "gptq", "bits": 8, "group_size": -1}, {"method": "none"}, {"bits_for": (".*o_proj=16",)}):
        assert dict(recipe.plan(given, flags))["export"] == ExportOptions(target=WEB)
    with pytest.raises(OptionError, match="tune trains more"):
        recipe.plan({**{name: given[name] for name in ("quantize",)}, "tune": {}, "export": {"target": WEB}}, {})


def test_its_benchmark_says_what_it_is(exported: tuple[Artifact, Artifact], text: Path, tmp_path: Path) -> None:
    """Sixteen bits round more than the order of additions does, and that is no damage; the original is measured beside."""
    packed, artifact = exported
    options = BenchOptions(
        target=WEB, reference=packed.path.parent / "model", stages=(packed.path,), text=text, text_tokens=256, repeats=1,
        prompt_lengths=(8,), new_tokens=4,
    )  # fmt: skip
    quick = replace(options, original_speed=False)
    (report,) = read(stages.run("bench", artifact, tmp_path / "bench", quick).path / "report.json").reports
    assert [row.name for row in report.stages] == ["original", "quantized", "onnx"]
    assert not any(row.suspect for row in report.stages)
    *_, shipped = _rows(Subject(artifact, "mine", (), (packed.path,)), options)
    assert shipped.exact is None  # on a real model more than the limit of what is exact
    jobs, reason = original_jobs(SpeedJob("artifact", (1,), (1,), 1, 0), options)
    assert jobs and not reason  # measured on the CPU, as the artifact is
    assert report.missing["memory.gpu_bytes"] == "measured on the CPU"
