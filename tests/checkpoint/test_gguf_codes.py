"""--keep-codes: the integers and scales of a GGUF file's Q4_0 and Q8_0 matrices are the very ones that ship."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from edgepress.exporters.graph.half_scales import CAST
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.packed import PackedFile, unpack_bits
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.options import ExportOptions, ImportOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from families import TINY
from gguf import GGMLQuantizationType, GGUFReader
from gguf_files import gguf_name, interleaved, write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig

Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
HEADS = {"q_proj": 4, "k_proj": 2}  # of the tiny model
Q_PROJ = "model.layers.0.self_attn.q_proj"


def kept(file: Path, out: Path) -> Artifact:
    return stages.run("import", Artifact.load(file), out, ImportOptions(keep_codes=True))


def in_the_file(file: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes, counted from 0, and scales of a matrix, read byte by byte as ggml-common.h lays them out."""
    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == gguf_name(f"{module}.weight"))
    codes, scales = [], []
    size = 18 if tensor.tensor_type.name == "Q4_0" else 34
    for row in tensor.data.tolist():
        codes.append([])
        scales.append([])
        for begin in range(0, len(row), size):
            scale, content = bytes(row[begin : begin + 2]), row[begin + 2 : begin + size]
            scales[-1].append(np.frombuffer(scale, "<f2")[0])
            if size == 18:
                codes[-1] += [byte % 16 for byte in content] + [byte // 16 for byte in content]
            else:
                codes[-1] += [byte + 128 if byte < 128 else byte - 128 for byte in content]
    return np.array(codes), np.array(scales, dtype=np.float32)


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
def test_codes_and_scales_are_the_files(kind: GGMLQuantizationType, tiny: Path, tmp_path: Path) -> None:
    """Of every matrix, embedding and head included, rows of query and key where transformers has them."""
    write_gguf(tiny, tmp_path / "model.gguf", kind)
    made = kept(tmp_path / "model.gguf", tmp_path / "out")
    assert made.format == "codes" and made.steps[-1].facts["kept_codes"] == {kind.name: 30}
    file = PackedFile(made.path)
    for module in ("model.embed_tokens", "lm_head", Q_PROJ, "model.layers.3.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        codes, scales = in_the_file(tmp_path / "model.gguf", module)
        heads = HEADS.get(module.rpartition(".")[2])
        rows = np.arange(len(codes)) if heads is None else interleaved(np.arange(len(codes))[:, None], heads)[:, 0]
        assert np.array_equal(file[module].unpacked()[rows], codes), module
        assert np.array_equal(file[module].scales[rows], scales), module
        assert file[module].zeros is None and file[module].group_size == 32


@pytest.mark.parametrize("kind", [Q4_0, Q8_0])
def test_the_artifact_holds_them_and_computes_what_they_stand_for(
    kind: GGMLQuantizationType, tiny: Path, text: Path, tmp_path: Path
) -> None:
    weights = write_gguf(tiny, tmp_path / "model.gguf", kind)
    made = kept(tmp_path / "model.gguf", tmp_path / "codes")
    exported = stages.run("export", made, tmp_path / "onnx", ExportOptions(accuracy_level="0", text=text))

    graph, file = ir.load(exported.path / "model.onnx").graph, PackedFile(made.path)
    (node,) = [node for node in graph if "layers.1.mlp.down_proj" in (node.name or "") and node.op_type == "MatMulNBits"]
    stored = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    linear = file["model.layers.1.mlp.down_proj"]
    assert np.array_equal(unpack_bits(stored, linear.bits, 32).reshape(linear.shape), linear.unpacked())
    half = graph.initializers[node.inputs[2].name.removesuffix(CAST)].const_value.numpy()  # type: ignore[union-attr]
    assert half.dtype == np.float16 and np.array_equal(half.reshape(linear.scales.shape), linear.scales)

    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    ids = np.arange(3, 43)
    with torch.inference_mode():
        truth = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(Decoder(exported.path).feed(ids, keep=0), truth, atol=2e-5 * np.abs(truth).max())


def test_only_the_rest_is_quantized(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "model.gguf", Q4_0, others={"ffn": Q4_1, "token_embd": Q8_0})
    made = kept(tmp_path / "model.gguf", tmp_path / "codes")
    assert made.steps[-1].facts["kept_codes"] == {"Q4_0": 17, "Q8_0": 1}
    packed = stages.run("quantize", made, tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32, head_bits=4))
    before, after = PackedFile(made.path), PackedFile(packed.path)
    for name in before:
        assert np.array_equal(before[name].codes, after[name].codes) and np.array_equal(before[name].scales, after[name].scales)
    facts = packed.steps[-1].facts
    assert facts["kept_codes"] == 18 and facts["head"] == {"model.embed_tokens": 8, "lm_head": 4}
    assert len(after) == 30 and not facts["kept_float"] and all(".mlp." in name for name in facts["relative_error"])
    rule = QuantizeOptions(method="rtn", bits_for=(".*q_proj=8",))
    with pytest.raises(OptionError, match="first match of no matrix"):
        stages.run("quantize", made, tmp_path / "other", rule)
    with pytest.raises(InputError, match=r"prune takes a float checkpoint.*without --keep-codes"):
        stages.run("prune", made, tmp_path / "other", PruneOptions(remove_count=1))


def test_a_tied_head_keeps_the_finer_codes(random_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of a head stored as Q8_0 beside its embedding as Q4_0, as Qwen2.5's files have them, the head's serve both."""
    tied = random_model(LlamaConfig(**TINY, tie_word_embeddings=True), tmp_path / "tied")
    others = {"attn_output": Q4_1, "output": Q8_0, "token_embd": Q4_0}
    write_gguf(tied, tmp_path / "model.gguf", Q4_1, others=others, head=True)
    made = kept(tmp_path / "model.gguf", tmp_path / "codes")
    assert made.steps[-1].facts["tied_from_two_matrices"] and made.steps[-1].facts["kept_codes"] == {"Q8_0": 1}
    (name,) = PackedFile(made.path)
    assert name == "model.embed_tokens" and PackedFile(made.path)[name].bits == 8


@pytest.mark.parametrize("method", ["gptq", pytest.param("gptqmodel", marks=pytest.mark.families)])  # that takes seconds to load
def test_gptq_of_the_rest(method: str, tiny: Path, text: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "model.gguf", Q4_0, others={"ffn": Q4_1})
    made = kept(tmp_path / "model.gguf", tmp_path / "codes")
    options = QuantizeOptions(method=method, group_size=32, calibration=text, calibration_tokens=2048)
    packed = stages.run("quantize", made, tmp_path / "packed", options)
    before, after = PackedFile(made.path), PackedFile(packed.path)
    assert len(after) == 30 and all(np.array_equal(before[name].codes, after[name].codes) for name in before)
    assert packed.steps[-1].facts["bits"] == {"4": 28}


def test_no_code_to_keep(tiny: Path, tmp_path: Path) -> None:
    write_gguf(tiny, tmp_path / "model.gguf", Q4_1)
    with pytest.raises(OptionError, match=r"holds no Q4_0 or Q8_0 matrix of the model, only Q4_1.*leave --keep-codes out"):
        kept(tmp_path / "model.gguf", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf"]


def test_build_keeps_codes(tiny: Path, tmp_path: Path, call: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the flag or by the recipe, into a folder named relative to where one stands; and what cannot be is said in one line."""
    monkeypatch.chdir(tmp_path)
    write_gguf(tiny, tmp_path / "model.gguf", Q4_0)
    (tmp_path / "quantize.yaml").write_text("quantize: {method: rtn}")
    result = call("build", "model.gguf", "out", "--recipe", "quantize.yaml", "--keep-codes")
    assert result.code == 0, result.err  # type: ignore[attr-defined]
    assert [step.stage for step in Artifact.load(tmp_path / "out/01-quantize").steps] == ["import", "quantize"]
    assert PackedFile(tmp_path / "out/01-quantize")[Q_PROJ].bits == 4
    for arguments, says in (
        (("model.gguf", "other", "--recipe", "default", "--keep-codes"), "prune cannot come here: .* codes that are kept are for"),
        ((tiny, "other", "--keep-codes"), "--keep-codes is for a GGUF file, and .* is none; leave it out"),
    ):
        refused = call("build", *arguments)
        assert refused.code == 2 and "Traceback" not in refused.err  # type: ignore[attr-defined]
        assert re.search(says, refused.err), refused.err  # type: ignore[attr-defined]
    assert not (tmp_path / "other").exists()
