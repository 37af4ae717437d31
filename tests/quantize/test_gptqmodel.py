"""GPTQ through gptqmodel: real runs, compared with gptqmodel's own words and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgepress.pipeline.checkpoint.blocks import block_linears
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.packed import PackedFile, PackedLinear
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.options import QuantizeOptions
from edgepress.pipeline.quantize import gptqmodel
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.text.windows import text_windows
from gptq_words import ones, unpack_words
from quantizing import GptqRun, Trained, matrices, no_windows, run_gptqmodel
from transformers import LlamaConfig


@pytest.mark.parametrize("shape", [(64, 172), (64, 16), (16, 64)], ids=str)
def test_gptq_three_bits(shape: tuple[int, int]) -> None:
    """No 3 bits by gptqmodel unless 32 divides input and output: said at once, not after the calibration."""
    job = QuantizeJob(
        Checkpoint(Path("nowhere")), {"good": (64, 64), "bad": shape}, no_windows, QuantizeOptions(bits=3), Path("nowhere")
    )
    with pytest.raises(OptionError, match="bad"):
        gptqmodel.quantize(job)


def test_gptq_against_raw_words(quantized: GptqRun) -> None:
    """Every weight worked out from gptqmodel's int32 words one at a time: no code, zero point or scale was changed or moved."""
    raw = quantized.raw()
    config = json.loads((quantized.scratch / "model" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq" and config["sym"] is False
    assert len(quantized.linears) == 28
    for name, linear in quantized.linears.items():
        rows, columns = linear.shape
        codes = unpack_words(raw[f"{name}.qweight"].T, 4, columns)
        zeros = unpack_words((raw[f"{name}.qzeros"].view(np.uint32) + ones(4)).view(np.int32), 4, rows).T
        scales = raw[f"{name}.scales"].T
        assert scales.dtype == np.float16 and scales.shape == (rows, -(-columns // 64))
        expected = np.empty(linear.shape, dtype=np.float32)
        for n in range(rows):
            for k in range(columns):
                expected[n, k] = np.float32(int(codes[n, k]) - int(zeros[n, k // 64])) * np.float32(scales[n, k // 64])
        assert np.array_equal(linear.dequantized(), expected)


@pytest.mark.families  # gptqmodel takes seconds to load; the words themselves are read in the test before
def test_gptq_against_gptqmodel(quantized: GptqRun) -> None:
    """The same as gptqmodel's own dequantization of its own checkpoint, array for array."""
    truth = quantized.dequantized()
    assert set(truth) == set(quantized.linears)
    assert all(np.array_equal(linear.dequantized(), truth[name]) for name, linear in quantized.linears.items())


def test_gptq_reads_float32(quantized: GptqRun) -> None:
    """Trap 7: gptqmodel would load bfloat16 by itself. The scales of a row's first group tell, which no other group moved.

    They are stored as float16 (5e-4 at most); the range of weights that were rounded to bfloat16 before is off by up to 4e-3.
    """
    raw, worst = quantized.raw(), 0.0
    for name, weight in matrices(quantized.source).items():
        first = weight[:, :64]
        span = np.maximum(first.max(1), 0) - np.minimum(first.min(1), 0)
        worst = max(worst, float(np.abs(raw[f"{name}.scales"][0].astype(np.float32) * 15 / span - 1).max()))
    assert worst < 6e-4


def test_gptq_records_what_it_used(quantized: GptqRun) -> None:
    """The calibration tokens of the manifest are those that were asked for and used."""
    (step,) = quantized.packed.steps
    assert step.facts["calibration_positions"] == sum(map(len, quantized.windows)) <= 2048 + len(quantized.windows)
    given = json.loads((quantized.scratch / "job.json").read_text())["windows"]
    assert given == [row.tolist() for row in quantized.windows]
    assert {len(row) for row in quantized.windows[:-1]} == {64}  # the first token of a text must count: see plan.WINDOW
    ids = np.concatenate(quantized.windows)
    assert step.facts["calibration"]["sha256_of_ids"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert step.facts["calibration"]["token_budget"] == 2048
    assert step.facts["padded"]["model.layers.0.mlp.down_proj"] == 32


def test_gptq_leaves_nothing_behind(quantized: GptqRun) -> None:
    """Logs of gptqmodel land where it stands; a user's working directory is not the place for them."""
    assert [p.name for p in quantized.cwd.rglob("*") if p.suffix != ".py"] == []


def test_gptq_runs_no_strangers_code(quantized: GptqRun) -> None:
    """Neither what the tokenizer brings, which gptqmodel's helper would trust, nor modules in the working directory."""
    assert (quantized.source / "own.py").is_file() and (quantized.cwd / "numpy.py").is_file()
    assert not (quantized.cwd.parent / "RAN").exists()
    assert not (quantized.packed.path / "own.py").exists()
    settings = json.loads((quantized.packed.path / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_gptq_beats_rounding(quantized: GptqRun) -> None:
    """Its purpose: less error in what the matrices put out on the calibration text, at the same bits and group."""
    model = load_model(quantized.source)
    squares: dict[str, np.ndarray] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, 1).double()
            squares[name] = squares.get(name, 0) + (x.T @ x).numpy()

        return hook

    for name, module in block_linears(model).items():
        module.register_forward_pre_hook(collect(name))
    with torch.inference_mode():
        for rows in (row[None] for row in quantized.windows):
            model(input_ids=torch.from_numpy(rows), use_cache=False)

    def error(linear: PackedLinear, weight: np.ndarray) -> float:
        lost = linear.dequantized().astype(np.float64) - weight
        return float(np.trace(lost @ squares[linear.name] @ lost.T) / np.trace(weight @ squares[linear.name] @ weight.T))

    ratios = {
        name: error(quantized.linears[name], weight) / error(round_to_nearest(name, weight, 4, 64, False), weight)
        for name, weight in matrices(quantized.source).items()
    }
    assert np.mean(list(ratios.values())) < 0.9, ratios
    assert max(ratios.values()) < 1.1, ratios


@pytest.mark.families
def test_gptq_by_module_and_in_act_order(tiny: Path, text: Path, tmp_path: Path) -> None:
    """--bits-for and --act-order reach gptqmodel: widths, permutations and what stays float are as asked."""
    done = run_gptqmodel(
        tiny, tmp_path, text, group_size=32, act_order=True, bits_for=("model.layers.0.mlp.*=8", "model.layers.1.*=16"),
        calibration_tokens=512,
    )  # fmt: skip
    file = PackedFile(done.packed.path)
    body = {name: file[name] for name in file if ".layers." in name}
    assert {name for name, linear in body.items() if linear.bits == 8} == {
        f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")
    }
    assert len(body) == 21 and not [name for name in body if ".layers.1." in name]
    assert all(linear.permutation is not None for linear in body.values())
    q, k, v = (body[f"model.layers.2.self_attn.{x}_proj"].permutation for x in "qkv")
    assert np.array_equal(q, k) and np.array_equal(q, v)  # one input, one Hessian diagonal, one order: one operator in ONNX
    assert max(done.packed.steps[-1].facts["relative_error"].values()) < 0.2


@pytest.mark.families
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, False), (3, 32, False), (4, 32, False), (4, 128, True), (8, 64, False)], ids=str
)
def test_gptq_layouts(
    tmp_path: Path, text: Path, random_model: Callable[..., Path], bits: int, group: int, symmetric: bool
) -> None:
    """Each width, groups that do not divide 172 (gptqmodel pads its rows, trap 11), and zero points of 0 (common at 2 bits)."""
    width = 192 if bits == 3 else 172
    config = LlamaConfig(
        vocab_size=5120, hidden_size=64, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    done = run_gptqmodel(random_model(config, tmp_path / "model"), tmp_path, text, bits=bits, group_size=group, symmetric=symmetric)
    truth = done.dequantized()
    assert len(truth) == 14
    wrong = [name for name, linear in done.linears.items() if not np.array_equal(linear.dequantized(), truth[name])]
    assert not wrong, f"{len(wrong)} of 14: {wrong}"
    assert all((linear.zeros is None) == symmetric for linear in done.linears.values())


@pytest.mark.families
def test_gptq_beats_rounding_on_a_trained_model(tmp_path: Path, shared_model: Callable[[str], Path], tinystories: Path) -> None:
    """Perplexity of babyllama-361 on text after its calibration text, 3 bits so that the difference is far above noise."""
    folder = shared_model("babyllama-361")
    done = run_gptqmodel(folder, tmp_path, tinystories, bits=3, group_size=32, calibration_tokens=16384)
    trained = Trained(folder, text_windows(tinystories, folder, budget=16000, skip=16384))
    whole, ours = trained.perplexity(), trained.perplexity(done.linears)
    assert whole < ours < trained.perplexity(trained.rounded(3, 32))
