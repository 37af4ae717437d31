"""The student computes what the packed checkpoint computes, and only what is float can learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.tune.student import Dequantized, Student
from families import TINY, family_config
from transformers import LlamaConfig


def matrix(rows: int = 24, columns: int = 96) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def act_order(packed: PackedLinear) -> PackedLinear:
    order = np.random.default_rng(1).permutation(packed.shape[1]).astype(np.int32)
    codes, zeros = packed.unpacked(), packed.zeros
    return PackedLinear.from_codes(packed.name, codes, packed.scales, zeros, packed.bits, packed.group_size, order)


def codebook() -> PackedLinear:
    codes = np.random.default_rng(2).integers(0, 256, size=24 * 97 // 2 + 1, dtype=np.uint8)
    scales = np.random.default_rng(3).random(-(-24 * 97 // 64)).astype(np.float32)
    return PackedLinear("m", (24, 97), 4, 64, codes, scales, codebook="nf4")


PACKED = {
    "2 bits": lambda: round_to_nearest("m", matrix(), 2, 32, symmetric=False),
    "4 bits": lambda: round_to_nearest("m", matrix(), 4, 32, symmetric=False),
    "8 bits": lambda: round_to_nearest("m", matrix(), 8, 32, symmetric=False),  # 255 from its zero point: beyond int8
    "symmetric": lambda: round_to_nearest("m", matrix(), 8, 32, symmetric=True),
    "a short last group": lambda: round_to_nearest("m", matrix(), 4, 64, symmetric=False),
    "whole rows": lambda: round_to_nearest("m", matrix(), 4, -1, symmetric=False),
    "act-order": lambda: act_order(round_to_nearest("m", matrix(), 4, 32, symmetric=False)),
    "codebook": codebook,
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_is_the_packed_matrix_bit_for_bit(kind: str, transposed: bool) -> None:
    packed = PACKED[kind]()
    weight = Dequantized(packed, transposed)(torch.from_numpy(packed.scales))
    assert torch.equal(weight.T if transposed else weight, torch.from_numpy(packed.dequantized()))


def test_only_floats_have_gradients(quantized: Artifact) -> None:
    """Scales and norms get one; the integers are a buffer of integers, which no gradient can reach."""
    student = Student(Checkpoint(quantized.path))
    student.model(input_ids=torch.arange(1, 20)[None]).logits.square().mean().backward()
    trained = dict(student.trained())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    others = {name: p for name, p in student.model.named_parameters() if name not in trained}
    assert all(p.grad is None and not p.requires_grad for p in others.values())
    values = [m.values for m in student.model.modules() if isinstance(m, Dequantized)]
    assert len(values) == 28 and all(not v.is_floating_point() and v.grad is None for v in values)


def test_the_gradient_of_a_scale_is_the_change_that_it_makes(quantized: Artifact) -> None:
    student, ids = Student(Checkpoint(quantized.path)), torch.arange(1, 20)[None]
    scales = next(p for name, p in student.trained() if name.endswith("weight.original"))

    def loss() -> torch.Tensor:
        return student.model(input_ids=ids).logits.square().mean()

    loss().backward()
    assert scales.grad is not None
    largest = scales.grad.abs().argmax()
    step, slope = 0.02 * scales.detach().abs().mean(), scales.grad.flatten()[largest]
    with torch.no_grad():
        ends = []
        for change in (step, -2 * step):
            scales.view(-1)[largest] += change
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / (2 * float(step)) == pytest.approx(float(slope), rel=0.05)


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_model_computes_what_its_folder_computes(
    family: str, head_bits: int, tmp_path: Path, random_model: Callable[..., Path]
) -> None:
    """Tied heads, embeddings that multiply, matrices stored the other way round; a 4-bit head learns for both ends."""
    config = LlamaConfig(**TINY, tie_word_embeddings=True) if family == "llama" else family_config(family)
    source = Artifact.load(random_model(config, tmp_path / "model"))
    settings = QuantizeOptions(method="rtn", bits=4, group_size=32, head_bits=head_bits)
    folder = stages.run("quantize", source, tmp_path / "quantized", settings).path
    student, ids = Student(Checkpoint(folder)), torch.arange(5, 40)[None]
    with torch.inference_mode():
        ours, theirs = (model(input_ids=ids).logits for model in (student.model, Checkpoint(folder).model()))
    assert torch.equal(ours, theirs)
    ends = [name for name in student.matrices if name.rpartition(".")[2] in ("embed_tokens", "wte", "lm_head")]
    assert len(ends) == (1 if head_bits == 4 else 0)
    repacked, before = student.packed(), Checkpoint(folder).weights
    assert repacked.keys() == before.matrices
    assert all(np.array_equal(repacked[name].scales, before.packed(name).scales) for name in repacked)  # type: ignore[union-attr]
