"""Every family, fused where it can be and portable: whole, without layers, packed; and wrong graphs caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.exporters import architecture, fused
from edgepress.exporters.graph.operators import operator, stacked
from edgepress.exporters.proof import parity
from edgepress.exporters.proof.reference import ReferenceLogits
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.checkpoint.weights import Weights
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime import targets
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows
from families import FAMILIES, LAYERS, TINY, WINDOW, family_config
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, PreTrainedConfig

FUSED = [name for name, family in architecture.FAMILIES.items() if family.fused]
REMOVED = (0, 2, 5)
KEPT = [index for index in range(LAYERS) if index not in REMOVED]
Build = Callable[..., Artifact]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text: Path, random_model: Callable[..., Path]) -> Build:
    """A family's random model, pruned or not, its matrices 4 bits wide or float."""
    base = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str, pruned: bool, method: str) -> Artifact:
        folder = base / name / f"{pruned}-{method}"
        if method != "none":
            return stages.run("quantize", make(name, pruned, "none"), folder, QuantizeOptions(method=method, group_size=32))
        if not pruned:
            return Artifact.load(random_model(family_config(name), folder))
        options = PruneOptions(remove_layers=REMOVED, calibration=text, calibration_tokens=256)
        return stages.run("prune", make(name, False, "none"), folder, options)

    return make


@pytest.fixture
def exported(checkpoint: Build, text: Path, tmp_path: Path) -> Build:
    def export(name: str, pruned: bool, method: str, exporter: str = "fused", **options: object) -> Artifact:
        settings = ExportOptions(exporter=exporter, text=text, accuracy_level=0, **options)  # type: ignore[arg-type]
        return stages.run("export", checkpoint(name, pruned, method), tmp_path / "onnx", settings)

    return export


def windows_of(name: str) -> list[int]:
    """The attention window of each layer of a whole model in tokens, -1 for none, as the architectures define it."""
    local = {
        "mistral": range(LAYERS),
        "phi3": range(LAYERS),
        "qwen2": range(4, LAYERS),  # from max_window_layers on
        "gemma2": range(0, LAYERS, 2),
        "gemma3_text": range(0, LAYERS, 2),
    }.get(name, ())
    return [WINDOW if index in local else -1 for index in range(LAYERS)]


def check(name: str, pruned: bool, source: Artifact, artifact: Artifact) -> None:
    """Proven in every reading, each layer with its own window, and the quantizer's integers bit for bit."""
    facts = artifact.steps[-1].facts
    exact = facts["parity"][0]
    assert facts["exporter"] == "fused" and facts["batch"] == "right-padded" and exact["tokens"] >= parity.PROOF_TOKENS
    assert all(exact[f"difference_{reading}"] < parity.TOLERANCE for reading in ("whole", "chunks", "steps", "batch"))
    graph = ir.load(artifact.path / "model.onnx").graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    kept = KEPT if pruned else list(range(LAYERS))
    assert [node.attributes["local_window_size"].as_int() for node in attention] == [windows_of(name)[index] for index in kept]
    if name == "smollm3":  # no positions in every second layer
        assert [node.attributes["do_rotary"].as_int() for node in attention] == [int(i % 2 == 0) for i in kept]
    assert sum(node.op_type == "MatMulNBits" for node in graph) in (0, 4 * len(kept) + 1)
    if (source.path / "packed.safetensors").is_file():
        same_codes(source, graph, fused_names(name, len(kept)))


def fused_names(name: str, layers: int) -> dict[str, list[str]]:
    """Matrix in the graph -> matrices of the checkpoint whose rows it holds, in order."""
    family = architecture.FAMILIES[name]
    names = {}
    for layer in (f"model.layers.{index}" for index in range(layers)):
        names[f"{layer}.self_attn.qkv_proj"] = [f"{layer}.self_attn.{part}" for part in family.qkv()]
        names[f"{layer}.mlp.gate_up_proj"] = [f"{layer}.mlp.{part}" for part in family.gate_up()]
        names |= {whole: [whole] for whole in (f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj")}
    return names


def same_codes(source: Artifact, graph: ir.Graph, names: dict[str, list[str]]) -> None:
    """Every packed array is in the graph as it is; those not in ``names`` have the same name in both."""
    file = PackedFile(source.path)
    below = {part for parts in names.values() for part in parts}
    for name, parts in (names | {one: [one] for one in file if one not in below}).items():
        whole = stacked(name, [file[part] for part in parts])
        assert whole is not None
        for kind, array in operator(whole, 0)[1].items():
            value = graph.initializers[f"{name}.{kind}"].const_value
            # the codes of an untied embedding are stored as rows (exporters/graph.py, rows_in_place): the same bytes in order
            assert value is not None and np.array_equal(value.numpy().ravel(), array.ravel()), f"{name}.{kind}"


def test_fused_after_removal(checkpoint: Build, exported: Build) -> None:
    """The one that is least like Llama, packed and without layers at the front, in the middle and at the back."""
    check("gemma3_text", True, checkpoint("gemma3_text", True, "rtn"), exported("gemma3_text", True, "rtn"))


@pytest.mark.families
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("pruned", "method"), [(False, "none"), (True, "rtn")])
def test_fused_families(name: str, pruned: bool, method: str, checkpoint: Build, exported: Build) -> None:
    check(name, pruned, checkpoint(name, pruned, method), exported(name, pruned, method))


@pytest.mark.families
@pytest.mark.parametrize("name", FUSED)
def test_half_precision_families(name: str, exported: Build) -> None:
    """What is exported for CUDA, through the CPU's kernels."""
    exact = exported(name, True, "rtn", target="cuda").steps[-1].facts["parity"][0]
    assert all(exact[f"difference_{reading}"] < parity.TOLERANCE_HALF for reading in ("whole", "chunks", "steps", "batch"))


# What the tracer has no operators for, and what has no keys and values to cache.
REFUSED = {"llama4_text": "complex-valued", "qwen3_next": "linear attention"}


@pytest.mark.families
@pytest.mark.parametrize("name", FAMILIES)
def test_portable_families(name: str, checkpoint: Build, exported: Build) -> None:
    """Pruned and packed; the proof includes a batch with padding on the left."""
    if name in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[name]):
            exported(name, True, "rtn", "portable")
        return
    artifact = exported(name, True, "rtn", "portable")
    facts = artifact.steps[-1].facts
    assert facts["exporter"] == "portable" and facts["batch"] == "left-padded"
    assert facts["parity"][0]["difference_batch"] < parity.TOLERANCE
    same_codes(checkpoint(name, True, "rtn"), ir.load(artifact.path / "model.onnx").graph, {})


def test_partial_rotary_embedding(random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Phi-4-mini turns a part of each head only."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = Phi3Config(**TINY | {"num_hidden_layers": 2, "num_attention_heads": 2}, pad_token_id=0, rope_parameters=rope)
    folder = random_model(config, tmp_path / "model")
    artifact = stages.run("export", Artifact.load(folder), tmp_path / "onnx", ExportOptions(exporter="fused", text=text))
    table = ir.load(artifact.path / "model.onnx").graph.initializers["cos_cache"]
    assert table.shape == (256, 8)  # of heads of 32


def test_what_the_fused_graph_cannot_say_is_said(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Frequencies that change with the length of the text, and a part of a head that the operator cannot turn."""
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    rope |= {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
    folder = random_model(Phi3Config(**TINY, pad_token_id=0, rope_parameters=rope), tmp_path / "phi3")
    checkpoint = Checkpoint(folder)
    assert "longrope" in str(architecture.obstacle(checkpoint))
    checkpoint.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "8 dimensions" in str(architecture.obstacle(checkpoint))


# ------------------------------------------------------------------------------- a proof that cannot fail proves nothing


def by_index(config: PreTrainedConfig, index: int) -> bool:
    """Trap 5: whether a layer is local, guessed from its number as the model builder does."""
    return index % 2 == 0


def no_cap(config: PreTrainedConfig) -> float:
    return 0.0


def one(config: PreTrainedConfig) -> float:
    return 1.0


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "window by index, gemma3": (
        "gemma3_text",
        lambda patch: patch.setattr(fused, "window", lambda config, i: config.sliding_window if by_index(config, i) else -1),
    ),
    "rotary embedding by index, gemma3": (
        "gemma3_text",
        lambda patch: patch.setattr(
            fused, "rotary_kind", lambda config, i: "sliding_attention" if by_index(config, i) else "full_attention"
        ),
    ),
    "window by index, gemma2": (
        "gemma2",
        lambda patch: patch.setattr(fused, "window", lambda config, i: config.sliding_window if by_index(config, i) else -1),
    ),
    "positions everywhere, smollm3": ("smollm3", lambda patch: patch.setattr(fused, "rotary_kind", lambda config, i: "")),
    "no cap of scores, gemma2": ("gemma2", lambda patch: changed(patch, "gemma2", attention_softcap=no_cap)),
    "no cap of logits, gemma2": ("gemma2", lambda patch: changed(patch, "gemma2", logits_softcap=no_cap)),
    "no scale of what is added, granite": ("granite", lambda patch: changed(patch, "granite", residual_scale=one)),
    "norm weight without 1, gemma": ("gemma", lambda patch: changed(patch, "gemma", norm_offset=0.0)),
}


def changed(patch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    patch.setitem(architecture.FAMILIES, name, replace(architecture.FAMILIES[name], **changes))  # type: ignore[arg-type]


SLOW = [what for what in WRONG if "gemma3" not in what]


@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.families if w in SLOW else ()) for w in WRONG])
def test_a_wrong_graph_is_caught(what: str, exported: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these is silent in exporters without a proof: layers take each other's window or positions after a removal."""
    name, break_graph = WRONG[what]
    break_graph(monkeypatch)
    with pytest.raises(ProofError, match="it is the final norm or the head" if "logits" in what else r"layer \d is the first"):
        exported(name, True, "none")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Only the exporters see one matrix of layer 2 multiplied by 1.5."""
    original = Weights.packed

    def packed(self: Weights, module: str) -> PackedLinear | None:
        matrix = original(self, module)
        wrong = matrix is not None and module == "model.layers.2.mlp.down_proj"
        return replace(matrix, scales=matrix.scales * np.float32(1.5)) if wrong and matrix is not None else matrix

    monkeypatch.setattr(Weights, "packed", packed)
    yield "layer 2 is the first that differs"


@pytest.mark.parametrize("exporter", ["fused", pytest.param("portable", marks=pytest.mark.families)])
def test_a_failed_proof_names_the_layer_and_deletes_nothing(
    exporter: str, broken: str, tiny: Path, text: Path, tmp_path: Path, call: Callable
) -> None:
    """Exit 2, one line, and the artifact of an earlier run stays as it was."""
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32))
    out = tmp_path / "onnx"
    stages.run("export", Artifact.load(tiny), out, ExportOptions(exporter="fused", text=text))
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    result = call("export", packed.path, out, "--exporter", exporter, "--text", text)
    assert result.code == 2 and broken in result.err.splitlines()[-1] and "Traceback" not in result.err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["onnx", "packed"]


def test_the_side_of_the_padding_is_proven(tiny: Path, text: Path, tmp_path: Path) -> None:
    """GroupQueryAttention counts a row's tokens and takes them for its first: padding on the left is refused, not answered."""
    artifact = stages.run("export", Artifact.load(tiny), tmp_path / "onnx", ExportOptions(exporter="fused", text=text))
    decoder = Decoder(artifact.path)
    ids = text_windows(text, tiny, budget=64, length=64)[0]
    reference = ReferenceLogits(load_model(tiny), [ids], tmp_path)
    assert parity.padded_batch(reference, decoder, ids) < 1e-4
    decoder.left_padding = True
    with pytest.raises(Exception, match="pad_on_the_right"):
        parity.padded_batch(reference, decoder, ids)


# ------------------------------------------------------------------------------------------------------------- float16 for CUDA


HALF = [("rtn", "fused"), *(pytest.param(*pair, marks=pytest.mark.families) for pair in (("nf4", "fused"), ("rtn", "portable")))]


@pytest.mark.parametrize(("method", "exporter"), HALF)
def test_cuda_graph_is_float16_throughout(method: str, exporter: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Inputs, outputs, cache and scales in half precision, the codes unchanged; proven on the CPU, which the manifest records."""
    options = QuantizeOptions(method=method, group_size=32 if method == "rtn" else None)
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", options)
    artifact = stages.run("export", packed, tmp_path / "onnx", ExportOptions(target="cuda", exporter=exporter, text=text))
    facts = artifact.steps[-1].facts
    assert (facts["target"], facts["activations"], facts["proven_on"]) == ("cuda", "float16", "CPUExecutionProvider")
    (exact,) = facts["parity"]
    assert parity.TOLERANCE < exact["difference_whole"] < parity.TOLERANCE_HALF and exact["top1_agreement"] >= parity.AGREEMENT_HALF
    graph = ir.load(artifact.path / "model.onnx").graph
    floats = [value for value in (*graph.inputs, *graph.outputs) if value.dtype != ir.DataType.INT64]
    assert len(floats) == 1 + 4 * 4 and all(value.dtype == ir.DataType.FLOAT16 for value in floats)
    assert not [name for name, value in graph.initializers.items() if value.dtype == ir.DataType.FLOAT and exporter == "fused"]
    one = PackedFile(packed.path)["model.layers.1.mlp.down_proj"]
    codes, scales = (graph.initializers[f"{one.name}.{part}"].const_value for part in ("B", "absmax" if one.codebook else "scales"))
    assert codes is not None and np.array_equal(codes.numpy(), one.codes)
    assert scales is not None and np.array_equal(scales.numpy(), one.scales.astype(np.float16))
    providers = read_json(artifact.path / "genai_config.json")["model"]["decoder"]["session_options"]["provider_options"]
    assert providers == [{"cuda": {"enable_cuda_graph": "0"}}]
    decoder, ids = Decoder(artifact.path), text_windows(text, artifact.path, budget=30, length=30)[0]
    assert len(list(decoder.greedy(ids, 8))) == 8 and decoder.dtype == np.float16
    (row,) = decoder.forward([ids])
    assert row.dtype == np.float32 and len(list(zip(range(2), decoder.greedy_batch(np.stack([ids, ids])), strict=False))) == 2


def test_what_overflows_in_float16_is_refused(tiny: Path, text: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] * 1e6}, folder / "model.safetensors")
    with pytest.raises(ProofError, match=r"layer 0 is the first.*more than 16 bits: use --target cpu"):
        stages.run("export", Artifact.load(folder), tmp_path / "onnx", ExportOptions(target="cuda", text=text))


def test_an_artifact_for_the_cpu_is_not_measured_on_cuda(
    tiny: Path, text: Path, call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA's GroupQueryAttention knows no float32: it would silently run on the CPU."""
    artifact = stages.run("export", Artifact.load(tiny), tmp_path / "onnx", ExportOptions(text=text))
    monkeypatch.setattr(targets, "target", lambda name: targets.TARGETS[name])
    result = call("bench", artifact.path, "--target", "cuda", "--text", text, "--out", tmp_path / "out")
    assert result.code == 2 and "export it with --target cuda" in result.err
