"""bitsandbytes formats against bitsandbytes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.quantize import bnb
from quantizing import job_of, matrices


def bitsandbytes_4bit(weight: np.ndarray, kind: str) -> tuple[bytes, bytes, np.ndarray]:
    """Codes and absmax of the matrix, and its weights restored by bitsandbytes.

    They are restored as one row: the AVX512 kernel of bitsandbytes 0.50.2 takes the wrong absmax for some widths that 64
    does not divide (96, 160, 352), though its quantization runs over the flattened matrix.
    """
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type=kind)
    flat = functional.quantize_4bit(torch.from_numpy(weight.reshape(-1)), blocksize=64, quant_type=kind)
    assert torch.equal(flat[0], codes) and torch.equal(flat[1].absmax, state.absmax)
    return codes.numpy().tobytes(), state.absmax.numpy().tobytes(), functional.dequantize_4bit(*flat).numpy().reshape(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bnb_4bit_is_bitsandbytes_own(tiny: Path, kind: str) -> None:
    """Codes and absmax byte for byte: what a user of bitsandbytes would get is what ships."""
    found = bnb.quantize_4bit(job_of(tiny, method=kind))
    assert len(found) == 28
    for name, weight in matrices(tiny).items():
        codes, absmax, truth = bitsandbytes_4bit(weight, kind)
        assert found[name].codebook == kind and found[name].shape == weight.shape
        assert found[name].codes.tobytes() == codes
        assert found[name].scales.tobytes() == absmax
        assert np.array_equal(found[name].dequantized(), truth)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_bnb_int8_is_bitsandbytes_own(tiny: Path, group: int) -> None:
    """Codes are q + 128 with one scale a row, repeated for the operator's blocks, the last one of 96 padded."""
    from bitsandbytes import functional

    found = bnb.quantize_int8(job_of(tiny, method="int8", group_size=group))
    assert len(found) == 28
    for name, weight in matrices(tiny).items():
        q, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
        linear = found[name]
        assert linear.zeros is None and linear.bits == 8 and linear.scales.shape == (weight.shape[0], linear.groups)
        assert np.array_equal(linear.unpacked().astype(np.int16) - 128, q.numpy())
        assert (linear.scales == linear.scales[:, :1]).all()
        assert np.allclose(linear.scales[:, 0] * 127, absmax.numpy(), rtol=2e-7, atol=0)
        # half a step, and what the float16 that bitsandbytes takes had rounded off before
        assert (np.abs(linear.dequantized() - weight) <= 0.501 * linear.scales[:, :1] + np.abs(weight) * 2.0**-11).all()


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_bnb_zero_rows(method: str, tiny: Path, copy_of: Callable[..., Path]) -> None:
    """A row that was pruned to zero has absmax 0: it stays zero and brings no NaN."""
    from safetensors.numpy import load_file, save_file

    folder, name = copy_of(tiny), "model.layers.0.mlp.up_proj"
    weights = load_file(folder / "model.safetensors")
    weights[f"{name}.weight"][1] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    quantize = bnb.quantize_int8 if method == "int8" else bnb.quantize_4bit
    restored = quantize(job_of(folder, method=method, group_size=64))[name].dequantized()
    assert not restored[1].any()
    assert 0 < np.abs(restored - weights[f"{name}.weight"]).max() < 0.6


def test_bnb_values_survive_a_forward(tiny: Path) -> None:
    """On CPUs with AVX512-BF16 a Linear4bit repacks codes and absmax in its first forward, and what is read after is corrupt.

    Ours come from the weights alone: neither those taken before nor those taken after such a forward change.
    """
    import bitsandbytes

    before = bnb.quantize_4bit(job_of(tiny, method="nf4"))
    kept = {name: (x.codes.tobytes(), x.scales.tobytes()) for name, x in before.items()}
    for weight in matrices(tiny).values():
        rows, columns = weight.shape
        if columns % 64:
            continue  # bitsandbytes' own repacking raises there
        module = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        module.weight = bitsandbytes.nn.Params4bit(torch.from_numpy(weight), quant_type="nf4", compress_statistics=False)
        module = module.to("cpu").eval().requires_grad_(False)
        absmax = module.weight.quant_state.absmax.numpy().copy()
        with torch.inference_mode():
            module(torch.ones(1, columns))
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # the trap, on CPUs that have it
            assert not np.array_equal(state.absmax.float().numpy().reshape(-1), absmax)
    after = bnb.quantize_4bit(job_of(tiny, method="nf4"))
    for name, weight in matrices(tiny).items():
        assert (before[name].codes.tobytes(), before[name].scales.tobytes()) == kept[name]
        assert (after[name].codes.tobytes(), after[name].scales.tobytes()) == kept[name] == bitsandbytes_4bit(weight, "nf4")[:2]
