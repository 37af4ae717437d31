"""Third-party quantized checkpoints: real folders of gptqmodel, optimum and transformers + bitsandbytes, taken over as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.importers.bnb import BnbFolder
from edgepress.pipeline.checkpoint.importers.gptq import GptqFolder
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.shards import ShardIndex
from edgepress.pipeline.checkpoint.weights import open_packed
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import read_json
from gptq_words import ones, pack_words, unpack_words
from safetensors.numpy import load_file, save_file
from third_party import BNB, GPTQ, V1, arrays, copied


def expected(raw: dict[str, np.ndarray], name: str, bits: int, v1: bool) -> np.ndarray:
    """Weights from the words, by the definition of the format and without edgepress."""
    g_idx, scales = raw[f"{name}.g_idx"], raw[f"{name}.scales"].astype(np.float32)
    stored = raw[f"{name}.qzeros"]
    zeros = unpack_words((stored.view(np.uint32) + ones(bits)).view(np.int32) if v1 else stored, bits, scales.shape[1])
    codes = unpack_words(raw[f"{name}.qweight"].T, bits, len(g_idx)).T
    found: np.ndarray = ((codes.astype(np.float32) - zeros.astype(np.float32)[g_idx]) * scales[g_idx]).T
    return found


def opened(folder: Path, original: Path | None = None) -> GptqFolder | BnbFolder:
    matrices = open_packed(folder, ShardIndex.of(folder), original)
    assert isinstance(matrices, GptqFolder | BnbFolder)
    return matrices


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_folder_is_taken_over(name: str, written: Path, source: Path) -> None:
    """Every weight as its words say, by both ways to learn how zero points are stored; labels have no vote."""
    raw = arrays(written / name)
    bits = 8 if "8-bits" in name else 4
    by_values = opened(written / name) if bits == 4 else None  # a step of 8 bits is too fine for the values to tell
    by_original = opened(written / name, source)
    assert len(list(by_original)) == 14 and set(by_original.parts) == {n for n in raw if n.rsplit(".", 1)[1] in layouts()}
    v1 = by_original.described["zero_points"] == "gptq"
    assert v1 == (name in V1)
    float_weights = load_file(source / "model.safetensors")
    for found in filter(None, (by_values, by_original)):
        for module in found:
            linear = found[module]
            assert np.array_equal(linear.dequantized(), expected(raw, module, bits, v1))
            weight = float_weights[f"{module}.weight"]
            assert np.linalg.norm(linear.dequantized() - weight) < 0.25 * np.linalg.norm(weight)
            assert (linear.zeros is None) == (name == "optimum-symmetric")
    permuted = [module for module in by_original if by_original[module].permutation is not None]
    assert len(permuted) == (14 if name == "optimum-act-order" else 2 if name == "gptqmodel-act-order" else 0)


def autogptq(folder: Path, target: Path, *, order: bool) -> Path:
    """A folder as AutoGPTQ 0.2 to 0.7 wrote it: settings beside config.json, one file of that name, biases of zeros.

    Its quantize_config.json knows no format and no method. Before 0.3 it stored no g_idx either (order=False).
    """
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config, settings = read_json(folder / "config.json"), read_json(folder / "quantize_config.json")
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    known = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")}
    known |= {"damp_percent": 0.01, "static_groups": False, "true_sequential": True}
    (target / "quantize_config.json").write_text(json.dumps(known | {"model_name_or_path": None, "model_file_base_name": "model"}))
    tensors = {name: array for name, array in arrays(folder).items() if order or not name.endswith("g_idx")}
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name.replace(".scales", ".bias")] = np.zeros(tensors[name].shape[1], np.float16)
    save_file(tensors, target / f"gptq_model-4bit-{settings['group_size']}g.safetensors")
    return target


@pytest.mark.parametrize("name", V1)
def test_autogptq_folder_is_taken_over(
    name: str, written: Path, source: Path, text: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """Act-order with g_idx, and the oldest layout without: array for array, and through export."""
    folder = autogptq(written / name, tmp_path / "autogptq", order=name == "gptqmodel-act-order")
    raw, found = arrays(written / name), opened(folder)
    assert len(list(found)) == 14 and found.described["zero_points"] == "gptq"
    for module in found:
        assert np.array_equal(found[module].dequantized(), expected(raw, module, 4, v1=True))
    result = call("export", folder, tmp_path / "onnx", "--text", text)
    assert result.code == 0, result.err
    assert "parity" in Artifact.load(tmp_path / "onnx").steps[-1].facts
    assert not (tmp_path / "onnx" / "quantize_config.json").exists()


def layouts() -> tuple[str, ...]:
    return ("qweight", "qzeros", "scales", "g_idx")


def moved(by: int) -> Callable[[dict[str, np.ndarray]], None]:
    """The zero points of one format as the other stores them: one more or less in every field."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith(".qzeros")]:
            words = tensors[name].view(np.uint32)
            tensors[name] = (words + ones(4) if by > 0 else words - ones(4)).view(np.int32)

    return change


@pytest.mark.parametrize("name", ["optimum-act-order", "optimum-symmetric", "gptqmodel-act-order"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_labels_lie(stored: str, label: str, name: str, written: Path, tmp_path: Path) -> None:
    """Trap 2: v2 zero points under the label of v1 and the other way round; trusted, each weight is off by one step."""
    wanted = opened(written / name)
    given = wanted.described["zero_points"]
    change = None if stored == given else moved(1 if stored == "gptq_v2" else -1)
    folder = copied(written / name, tmp_path / "copy", change, format=label, checkpoint_format=label)
    found = opened(folder)
    assert found.described["zero_points"] == stored
    assert all(np.array_equal(found[module].dequantized(), wanted[module].dequantized()) for module in wanted)


def between(tensors: dict[str, np.ndarray]) -> None:
    """Codes and zero points such that the two readings move the weights half a step to either side of nothing."""
    for name in [n for n in tensors if n.endswith(".qzeros")]:
        groups, words = tensors[name].shape
        zeros = np.full((groups, words * 8), 7, np.uint8)
        zeros[:, ::2] = 8
        tensors[name] = pack_words(zeros, 4)
        codes = np.full((words * 8, 96 if "down_proj" in name else 64), 8, np.uint8)
        tensors[name.replace("qzeros", "qweight")] = np.ascontiguousarray(pack_words(codes, 4).T)


def test_ambiguous_zero_points_are_refused_or_resolved(written: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """Ambiguous values are never guessed at; the float weights resolve them."""
    folder = copied(written / "optimum-act-order", tmp_path / "copy", between)
    with pytest.raises(ModelError, match=r"--original DIR"):
        opened(folder)
    result = call("export", folder, tmp_path / "out")
    assert result.code == 2 and "--original DIR" in result.err.splitlines()[-1] and not (tmp_path / "out").exists()
    # the same zero points, with float weights that one reading restores
    original = copied(folder, tmp_path / "float")
    made = {
        f"{m}.weight": np.ascontiguousarray(expected(arrays(folder), m, 4, v1=True)) for m in opened(written / "optimum-act-order")
    }
    save_file(made, original / "model.safetensors", metadata={"format": "pt"})
    found = opened(folder, original)
    assert found.described == {"quant_method": "gptq", "zero_points": "gptq", "zero_points_by": "the original weights"}
    assert all(np.array_equal(found[m].dequantized(), made[f"{m}.weight"]) for m in found)


def test_another_original_is_refused(written: Path, tiny: Path, source: Path, tmp_path: Path) -> None:
    """Float weights that have nothing to do with the codes decide nothing."""
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "other")
    dice = np.random.default_rng(0)
    save_file(
        {n: dice.permuted(w.reshape(-1)).reshape(w.shape) for n, w in tensors.items()},
        tmp_path / "other" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="is not what --original"):
        opened(written / "optimum-act-order", tmp_path / "other")


@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes_folder_is_taken_over(name: str, bitsandbytes: tuple[Path, dict[str, dict[str, np.ndarray]]]) -> None:
    """Weights as bitsandbytes restores them, single or double quantized, array for array."""
    folder, truth = bitsandbytes
    found = opened(folder / name)
    assert set(found) == set(truth[name]) and len(truth[name]) == 14
    for module, weights in truth[name].items():
        linear: PackedLinear = found[module]
        assert np.array_equal(linear.dequantized(), weights)
        assert (linear.codebook or "int8") == name.split("-")[0]
    raw = arrays(folder / name)
    assert set(found.parts) == {n for n in raw if "_proj" in n}


@pytest.mark.parametrize("name", ["optimum-act-order", "gptqmodel-act-order", "nf4-double", "int8"])
def test_export_takes_them_as_they_are(
    name: str, written: Path, bitsandbytes: tuple[Path, Any], text: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    """From the folder to a proven artifact; what was float stays float (trap 4: a head quantized behind one's back)."""
    folder = (written if name in GPTQ else bitsandbytes[0]) / name
    result = call("export", folder, tmp_path / "onnx", "--text", text)
    assert result.code == 0, result.err
    artifact = Artifact.load(tmp_path / "onnx")
    facts = artifact.steps[-1].facts
    assert facts["exporter"] == "fused" and facts["imported"]["quant_method"] in ("gptq", "bitsandbytes")
    assert facts["parity"][0]["greedy_match_tokens"] == 32
    assert "quantization_config" not in read_json(artifact.path / "config.json")
    graph = ir.load(artifact.path / "model.onnx").graph
    assert "lm_head.weight" in graph.initializers and "lm_head.B" not in graph.initializers
    kind = "MatMulBnb4" if name.startswith("nf4") else "MatMulNBits"
    nodes = [node for node in graph if node.op_type == kind]
    assert len(nodes) == 2 * 4
    assert all(len(node.inputs) <= 4 for node in nodes)  # trap 1: never g_idx, the fifth, beside packed zero points


def test_quality_of_a_folder_of_another(written: Path, source: Path) -> None:
    """Its torch model, for bench: the float one with other block matrices."""
    model, whole = load_model(written / "optimum-act-order"), load_model(source)
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        ours, theirs = (m(input_ids=ids).logits for m in (model, whole))
    assert 0 < (ours - theirs).std() < 0.5 * theirs.std()
