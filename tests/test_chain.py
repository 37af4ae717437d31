"""The whole chain on trained models: the command that a user types, and what its report must then say."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.files import read_json
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions, VerifyOptions
from edgepress.pipeline.text.windows import text_windows
from edgepress.pipeline.verify.checks import verify
from transformers import AutoModelForCausalLM, LlamaConfig

from .conftest import TINY

SHORT = ["--repeats", 1, "--prompt-lengths", 16, "--new-tokens", 8]


@pytest.fixture(scope="module")
def built(edgepress: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model through all stages, round to nearest for speed."""
    out = tmp_path_factory.mktemp("chain") / "with spaces and ü"
    few = ["--text-tokens", 800, "--calibration-tokens", 4000, "--shortlist", 2, "--greedy-tokens", 128]
    result = edgepress("build", "reference", out, "--method", "rtn", *few, *SHORT)
    assert result.code == 0, result.err
    assert "ONNX as shipped" in result.out and shlex.join(["edgepress", "run", str(out / "04-export")]) in result.out
    return out


def test_each_stage_loses_a_little_and_the_report_says_where(built: Path, reference: Path) -> None:
    """On a trained model removal costs something, quantization at 4 bits less, the export next to nothing."""
    stages = {row["name"]: row for row in read_json(built / "05-bench" / "report.json")["stages"]}
    assert list(stages) == ["original", "pruned", "healed", "quantized", "onnx_level_0", "onnx"]
    assert stages["original"]["kl_mean"] == 0 and stages["original"]["top1_agreement"] == 1
    assert stages["original"]["perplexity"] < stages["pruned"]["perplexity"] < 1.5 * stages["original"]["perplexity"]
    assert stages["onnx"]["perplexity"] == pytest.approx(stages["quantized"]["perplexity"], rel=0.01)
    assert stages["onnx"]["bytes"] < 0.4 * stages["original"]["bytes"]
    windows = text_windows(reference / "evaluation.txt", reference, budget=800)
    assert stages["original"]["perplexity"] == pytest.approx(np.exp(mean_loss(load_model(reference), windows)), rel=1e-6)


def test_the_same_without_removal_is_built_and_measured_beside(built: Path) -> None:
    """Otherwise nobody could tell whether removing layers was worth it."""
    content = read_json(built / "05-bench" / "report.json")
    (baseline,) = content["compared_with"]
    assert baseline["artifact"] == "baseline" and [step["stage"] for step in baseline["steps"]] == ["quantize", "export"]
    assert [row["name"] for row in baseline["stages"]] == ["original", "quantized", "onnx_level_0", "onnx"]
    assert baseline["stages"][0] == content["stages"][0]
    assert baseline["figures"]["quality.kl_mean"]["median"] < content["figures"]["quality.kl_mean"]["median"]
    assert {c["than"] for c in content["comparisons"]} == {content["artifact"]}
    decision, _, *lines = (built / "05-bench" / "report.md").read_text().splitlines()[2:6]  # a busy machine has a line of its own
    (top,) = (line for line in lines if "baseline" in line)
    assert decision.startswith("**Ship ") and ("Pruning does not pay off" in top or "without 2 layers" in top)


def test_pruned_stage_is_a_plain_checkpoint(built: Path, text: Path) -> None:
    """Plain transformers loads it and generates with the cache what it generates without."""
    model = AutoModelForCausalLM.from_pretrained(built / "01-prune", dtype=torch.float32).eval()
    assert model.config.num_hidden_layers == 14
    ids = torch.from_numpy(text_windows(text, built / "01-prune", budget=40, length=40)[0])[None]
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings))


def test_the_artifact_runs_without_torch(built: Path) -> None:
    """The light base is enough to run what was shipped."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'safetensors', 'gptqmodel'): sys.modules[name] = None\n"
        "from edgepress.pipeline.cli import main\n"
        f"sys.exit(main(['run', {str(built)!r}, 'The old house stood', '--max-new-tokens', '12']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The old house stood") and len(done.stdout.split()) > 8


@pytest.mark.families
@pytest.mark.parametrize(("name", "full", "exporter"), [("stories260k", 4.27, "portable"), ("babyllama-361", 2.20, "fused")])
def test_shared_models_through_gptq(
    name: str,
    full: float,
    exporter: str,
    shared_model: Callable[[str], Path],
    tinystories: Path,
    edgepress: Callable,
    tmp_path: Path,
) -> None:
    """Calibrated on TinyStories after its first 16,000 tokens, judged on those; GPTQ no worse than rounding at the same bits."""
    source = shared_model(name)
    common = ["--remove-count", 1, "--bits", 4, "--group-size", 32, "--calibration", tinystories, "--calibration-skip", 16000]
    common += ["--text", tinystories, "--text-tokens", 16000, *SHORT]
    found = {}
    for method in ("gptq", "rtn"):
        out = tmp_path / method
        result = edgepress("build", source, out, "--method", method, *common)
        assert result.code == 0, result.err
        report = read_json(out / "05-bench" / "report.json")
        found[method] = {row["name"]: row for row in report["stages"]}
        facts = Artifact.load(out / "04-export").steps[-1].facts
        assert facts["exporter"] == exporter
        exact = facts["parity"][0]
        assert max(exact["difference_whole"], exact["difference_chunks"], exact["difference_steps"]) < 1e-3
        assert exact["greedy_match_tokens"] == 32
        print(name, method, json.dumps(found[method]))
    assert found["gptq"]["original"]["perplexity"] == pytest.approx(full, rel=2e-3)
    assert found["gptq"]["quantized"]["perplexity"] <= found["rtn"]["quantized"]["perplexity"]
    assert found["gptq"]["onnx"]["kl_mean"] <= found["rtn"]["onnx"]["kl_mean"] * 1.02


ROOM = 8e9  # bytes: two checkpoints in bfloat16, and twice the graph while it is written


@pytest.mark.families
def test_more_than_two_gigabytes(random_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """No ONNX message holds as much: the weights lie beside the graph, some of them past the 2**31st byte."""
    if (free := shutil.disk_usage(tmp_path).free) < ROOM:
        pytest.skip(f"{free / 1e9:.1f} GB of disk are free, and this writes {ROOM / 1e9:.0f}")
    large = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 7, "num_attention_heads": 24}
    source = random_model(LlamaConfig(**{**TINY, **large}), tmp_path / "großes Modell", torch.bfloat16)
    options = PruneOptions(remove_layers=(2,), calibration=text, calibration_tokens=300)
    pruned = stages.run("prune", Artifact.load(source), tmp_path / "01 ohne 2", options)
    shutil.rmtree(source)
    made = stages.run("export", pruned, tmp_path / "02 onnx", ExportOptions(exporter="fused", text=text))
    data = made.path / "model.onnx.data"
    assert data.stat().st_size > 2**31 and (made.path / "model.onnx").stat().st_size < 2**20
    values = ir.load(made.path / "model.onnx").graph.initializers.values()
    assert max(value.const_value.offset for value in values if isinstance(value.const_value, ir.ExternalTensor)) > 2**31
    assert {check.state for check in verify(made.path, VerifyOptions())} <= {"ok", "not checked"}
    packed = stages.run("quantize", pruned, tmp_path / "03 packed", QuantizeOptions(method="rtn"))
    small = stages.run("export", packed, tmp_path / "04 onnx", ExportOptions(text=text))
    assert small.steps[-1].facts["parity"][0]["greedy_match_tokens"] == 32
