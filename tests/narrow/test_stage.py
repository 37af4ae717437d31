"""The narrowed checkpoint, read by plain transformers, against the original without those channels; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edgepress.models import CALIBRATION_TEXT
from edgepress.pipeline import recipe
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.narrow import stage
from edgepress.pipeline.narrow.feed_forward import FeedForward
from edgepress.pipeline.options import NarrowOptions
from edgepress.pipeline.report.steps import Step, describe
from edgepress.pipeline.stages import run
from families import family_config
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

TRIED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "gpt2", "opt", "phi", "gpt_neox")
DOWN = {"gpt2": "mlp.c_proj", "opt": "fc2", "phi": "mlp.fc2", "gpt_neox": "dense_4h_to_h"}
_SMALL = {"vocab_size": 5120, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "bitnet": _SMALL | {"num_hidden_layers": 2},
    "gemma4_text": _SMALL | {
        "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 5120, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8,
    },
}  # fmt: skip
IDS = torch.tensor([[5, 17, 300, 4, 1999, 60, 61, 62, 2000, 7, 9, 11]])


def narrowed(source: Path, out: Path, **options: Any) -> Artifact:
    options = {"remove_channels": 0.25, "calibration": CALIBRATION_TEXT, "calibration_tokens": 1024, **options}
    return run("narrow", Artifact.load(source), out, NarrowOptions(**options))


def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_plain(source: Path, out: Path, down: str) -> None:
    """Without a refit: the original with zeros in place of what reads the channels that went; cached equals uncached."""
    before, after, kept = model(source), model(out), read_json(out / stage.TABLE)["kept_channels"]
    readers = [module for name, module in before.named_modules() if name.endswith(down)]
    assert len(readers) == len(kept)
    with torch.inference_mode():
        for module, left in zip(readers, kept, strict=True):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            gone = [channel for channel in range(weight.shape[1]) if channel not in left]
            assert left == sorted(left) and gone
            weight[:, gone] = 0
        wanted, found = (one(input_ids=IDS, use_cache=False).logits for one in (before, after))
        first = after(input_ids=IDS[:, :6], use_cache=True)
        rest = after(input_ids=IDS[:, 6:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max() + 1))
    torch.testing.assert_close(rest, found[:, 6:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_without_a_refit_it_is_the_original_less_those_channels(
    family: str, random_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = random_model(family_config(family), tmp_path / "source")
    artifact = narrowed(source, tmp_path / "out", refit=False)
    check_plain(source, tmp_path / "out", DOWN.get(family, "mlp.down_proj"))
    facts = artifact.steps[-1].facts
    before, after = facts["width"]
    assert after == before * 3 // 4 and facts["parameters"][1] < facts["parameters"][0]
    assert describe(Step("narrow", {}, facts)) == (
        f"narrow: {after} of {before} feed-forward channels kept in every block, not refitted"
    )


@pytest.mark.families
def test_the_refit_wins_back_most(reference: Path, tmp_path: Path) -> None:
    """Of what 40 % of the embedded model's channels cost, on text that it did not learn from."""
    losses = []
    for refit in (True, False):
        artifact = narrowed(reference, tmp_path / str(refit), remove_channels=0.4, refit=refit, calibration_tokens=3072)
        before, after = artifact.steps[-1].facts["held_out_perplexity"]
        losses.append(after / before - 1)
    assert 0 < losses[0] < 0.5 * losses[1], losses


def test_a_build_narrows_before_it_quantizes() -> None:
    steps = recipe.plan(recipe.read("reference"), {"remove_channels": 0.1})
    assert [name for name, _ in steps] == ["prune", "heal", "narrow", "quantize", "export", "bench"]


@pytest.mark.families
def test_a_build_shows_what_narrowing_brought(tiny: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    flags = (
        "--method",
        "rtn",
        "--group-size",
        32,
        "--remove-channels",
        0.25,
        "--remove-count",
        0,
        "--calibration",
        CALIBRATION_TEXT,
    )
    short = ("--repeats", 1, "--prompt-lengths", 8, "--new-tokens", 4, "--text-tokens", 256, "--no-original-speed")
    result = call("build", tiny, tmp_path / "out", *flags, *short, "--calibration-tokens", 256)
    assert result.code == 0, result.err
    rows = [line.split()[0] for line in result.out.splitlines() if line and line[0].isalpha()]
    assert "narrowed" in rows and "baseline" in result.out and "72 of 96 feed-forward channels" in result.out + result.err
    small, whole = (
        sum(f.stat().st_size for f in (tmp_path / "out" / name).glob("model.onnx*")) for name in ("05-export", "baseline/02-export")
    )
    assert small < whole


def test_what_was_not_judged_is_not_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage._write

    def other(checkpoint: Any, out: Path, feed: FeedForward, chosen: list[torch.Tensor], blocks: Any) -> None:
        real(checkpoint, out, feed, chosen, blocks)
        gate = next(name for name in feed.axes if "gate" in name)
        stage.replace_tensors(out, {gate: load_file(out / "model.safetensors")[gate].roll(1, 0)})

    monkeypatch.setattr(stage, "_write", other)
    with pytest.raises(ProofError, match="logits differ"):
        narrowed(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("width", "fraction", "kept"), [(1536, 0.1, 1408), (1536, 0.001, 1472), (768, 0.1, 704), (96, 0.25, 72)])
def test_what_is_left_suits_kernels(width: int, fraction: float, kept: int) -> None:
    assert stage.kept_width(width, fraction) == kept


@pytest.mark.parametrize(("flags", "says"), [
    ((), "say how much to remove: --remove-channels 0.1"),
    (("--remove-channels", 1), "must lie between 0 and 1"),
    (("--remove-channels", 0.99), ("leaves fewer than 8", "give less")),
])  # fmt: skip
def test_refusals(
    flags: tuple[object, ...], says: tuple[str, ...] | str, refused: Callable[..., None], tiny: Path, tmp_path: Path
) -> None:
    refused("narrow", tiny, tmp_path / "out", *flags, says=says)


@pytest.mark.parametrize(("family", "says"), [
    ("mixtral", "belong to experts"), ("bloom", "has no width"), ("bitnet", "ffn_sub_norm.weight, which depends on all of them"),
    ("gemma4_text", "share more than the residual stream"),
])  # fmt: skip
def test_models_without_such_channels(family: str, says: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family](**OTHERS[family]) if family in OTHERS else family_config(family)
    with pytest.raises(ModelError, match=says):
        narrowed(random_model(config, tmp_path / "source"), tmp_path / "out")


def test_a_build_refuses_before_anything_is_measured(
    random_model: Callable[..., Path], refused: Callable[..., None], tiny: Path, tmp_path: Path
) -> None:
    """What config.json alone says is not learnt after layers were removed and healed."""
    mixtral = random_model(family_config("mixtral"), tmp_path / "source")
    flags = ("--method", "rtn", "--remove-count", 1, "--calibration-tokens", 64)
    for source, share, says in ((mixtral, 0.1, "belong to experts"), (tiny, 0.99, "leaves fewer than 8")):
        refused("build", source, tmp_path / "out", *flags, "--remove-channels", share, says=says)
        assert not (tmp_path / "out" / "01-prune").exists()


@pytest.mark.families
@pytest.mark.parametrize("family", TRIED)
def test_families(family: str, random_model: Callable[..., Path], call: Callable[..., Any], tmp_path: Path) -> None:
    """Narrowed with and without a refit, read again by transformers, quantized, and exported through both exporters."""
    source = random_model(family_config(family), tmp_path / "source")
    narrowed(source, tmp_path / "plain", refit=False)
    check_plain(source, tmp_path / "plain", DOWN.get(family, "mlp.down_proj"))
    narrowed(source, tmp_path / "out")
    packed = tmp_path / "packed"
    assert call("quantize", tmp_path / "out", packed, "--method", "rtn", "--group-size", 32).code == 0
    for exporter in ("portable", "auto"):
        result = call("export", packed, tmp_path / exporter, "--exporter", exporter)
        assert result.code == 0, result.err
