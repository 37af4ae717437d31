"""`edgepress verify`: a valid artifact passes, each fault is named by its check, and the light base is enough."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact, write_manifest
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.files import read_json, write_json
from edgepress.pipeline.options import ExportOptions, QuantizeOptions, VerifyOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.verify import checks as verify
from families import TINY
from patience import HUNG
from transformers import LlamaConfig, PreTrainedModel

CHECKS = ["files", "graph", "tokenizer", "chat template", "loads", "generates"]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
MAIN = "from edgepress.pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
LIGHT = ["torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript", "gptqmodel", "bitsandbytes", "peft", "optimum"]


@pytest.fixture(scope="module")
def made(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """(packed, exported) in a folder whose name has blanks and letters beyond ASCII, with a chat template."""
    folder = tmp_path_factory.mktemp("verify") / "été à Zürich"
    source = folder / "model"
    source.mkdir(parents=True)
    for file in tiny.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "chat_template.jinja").write_text(TEMPLATE)
    packed = stages.run("quantize", Artifact.load(source), folder / "packed", QuantizeOptions(method="rtn", group_size=32))
    options = ExportOptions(text=text, accuracy_level="4")
    return packed, stages.run("export", packed, folder / "onnx", options)


@pytest.fixture
def copied(made: tuple[Artifact, Artifact], tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    for file in made[1].path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def outcome(folder: Path, **options: object) -> dict[str, tuple[str, str]]:
    return {c.name: (c.state, c.detail) for c in verify.verify(folder, VerifyOptions(**options))}  # type: ignore[arg-type]


def test_a_valid_artifact(made: tuple[Artifact, Artifact], call: Callable) -> None:
    """One line a check, exit 0; the folder's name is no obstacle, nor is the OUT of a build."""
    for folder in (made[1].path, made[1].path.parent):
        result = call("verify", folder)
        assert result.code == 0 and not result.err
        lines = result.out.splitlines()
        assert [line[13:].partition(":")[0] for line in lines] == CHECKS
        assert all(line.startswith("ok  ") for line in lines)
    assert "'The old house stood" in lines[-1] and "first message takes" in lines[3]


def test_parity_with_the_checkpoint_that_was_exported(made: tuple[Artifact, Artifact], text: Path) -> None:
    """The proof of the export again; nothing is left in the folder, which may be read-only."""
    before = sorted(made[1].path.iterdir())
    made[1].path.chmod(0o555)
    try:
        state, detail = outcome(made[1].path, original=made[0].path, text=text)["parity"]
    finally:
        made[1].path.chmod(0o755)
    assert state == "ok" and "equals packed at float activations" in detail and "as it ships" in detail
    assert sorted(made[1].path.iterdir()) == before


def test_an_earlier_checkpoint_is_measured_not_proven(made: tuple[Artifact, Artifact], text: Path, tmp_path: Path) -> None:
    """What was quantized since cannot be equal; the proof takes the checkpoint in the folder next to it, if there is one."""
    original = made[0].path.parent / "model"
    state, detail = outcome(made[1].path, original=original, text=text)["parity"]
    assert state == "ok" and "equals packed" in detail and "from model, quantized since: KL 0." in detail
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in made[1].path.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    state, detail = outcome(moved, original=original, text=text)["parity"]
    assert state == "ok" and detail.startswith("no proof: ") and "equals" not in detail


def test_another_checkpoint_without_a_manifest_is_measured_too(made: tuple[Artifact, Artifact], text: Path, tmp_path: Path) -> None:
    """Exported from a plain folder, and verified with a folder of other content: no proof, and no failure."""
    plain = made[0].path.parent / "model"
    artifact = stages.run("export", Artifact.load(plain), tmp_path / "onnx", ExportOptions(text=text))
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    (other / "README").write_text("not the folder that was exported")
    state, detail = outcome(artifact.path, original=other, text=text)["parity"]
    assert state == "ok" and "no proof" in detail
    assert "equals model" in outcome(artifact.path, original=plain, text=text)["parity"][1]


def test_parity_needs_a_manifest(copied: Path, made: tuple[Artifact, Artifact], text: Path) -> None:
    (copied / "manifest.json").unlink()
    state, detail = outcome(copied, original=made[0].path, text=text)["parity"]
    assert state == "failed" and "manifest" in detail


def test_the_original_is_out_of_memory_before_a_session_opens(
    made: tuple[Artifact, Artifact], copied: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, opened, init = [], [], Decoder.__init__

    def loaded(self: Checkpoint) -> PreTrainedModel:
        model = load_model(self.path)
        models.append(weakref.ref(model))
        return model

    def checked(self: Decoder, *arguments: Any, **settings: Any) -> None:
        opened.append([model() for model in models])
        init(self, *arguments, **settings)

    monkeypatch.setattr(Checkpoint, "model", loaded)
    monkeypatch.setattr(Decoder, "__init__", checked)
    state, detail = outcome(copied, original=made[0].path.parent / "model", text=text)["parity"]
    assert state == "ok" and detail.startswith("no proof: ")
    assert opened[-1] == [None]


def test_a_wrong_scale_is_caught_though_the_files_are_whole(made: tuple[Artifact, Artifact], copied: Path, text: Path) -> None:
    """A fault that no checksum sees: the manifest was written after it."""
    graph = ir.load(copied / "model.onnx")
    value = graph.graph.initializers["model.layers.1.mlp.down_proj.scales"]
    scales = value.const_value.numpy().copy()
    scales[3, 0] *= 1.5
    value.const_value = ir.Tensor(scales, name=value.name)
    ir.save(graph, copied / "model.onnx", external_data="model.onnx.data")
    write_manifest(copied, "onnx", made[1].steps, made[1].fingerprint)
    outcomes = outcome(copied, original=made[0].path, text=text)
    assert outcomes.pop("parity")[0] == "failed"
    assert {state for state, _ in outcomes.values()} == {"ok"}


def test_more_divergence_than_the_export_allowed(made: tuple[Artifact, Artifact], copied: Path, text: Path) -> None:
    *before, step = made[1].steps
    write_manifest(copied, "onnx", (*before, replace(step, facts={**step.facts, "max_added_kl": 1e-9})), "")
    state, detail = outcome(copied, original=made[0].path, text=text)["parity"]
    assert state == "failed" and "its export allowed KL 1e-09" in detail and "--accuracy-level 0" in detail


def swap_byte(folder: Path) -> None:
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[5000] ^= 1
    (folder / "model.onnx.data").write_bytes(content)


def cut_short(folder: Path) -> None:
    content = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(content[:-5000])


def break_graph(folder: Path) -> None:
    """A node that reads what nothing writes."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[9].input[0] = "nowhere"
    onnx.save(model, folder / "model.onnx")


def other_tokenizer(folder: Path) -> None:
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"vocab_size": 12})


def other_layers(folder: Path) -> None:
    config = read_json(folder / "genai_config.json")
    config["model"]["decoder"]["num_hidden_layers"] = 3
    write_json(folder / "genai_config.json", config)


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")


FAULTS = [
    (swap_byte, "files", "model.onnx.data differs from the manifest"),
    (lambda folder: (folder / "config.json").unlink(), "files", "config.json is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "files", "no manifest.json"),
    (cut_short, "loads", "onnxruntime cannot load"),
    (break_graph, "graph", "not a valid ONNX graph"),
    (other_tokenizer, "tokenizer", "beyond the 12 tokens"),
    (other_layers, "loads", "genai_config.json has 3 layers"),
    (bad_template, "chat template", "cannot be read"),
]


@pytest.mark.parametrize(("damage", "check", "detail"), FAULTS, ids=[f"{check}-{detail.split()[0]}" for _, check, detail in FAULTS])
def test_faults_are_named(damage: Callable, check: str, detail: str, copied: Path, call: Callable) -> None:
    """The check's line names what is wrong and what to do; the other checks still run; exit 2."""
    damage(copied)
    outcomes = outcome(copied)
    assert outcomes[check][0] == "failed" and detail in outcomes[check][1], outcomes
    assert any(cure in outcomes[check][1] for cure in ("export again", "copy the complete folder", "correct it"))
    assert outcomes["files"][0] == "failed"
    assert (outcomes["generates"] == ("not checked", "the model does not load")) == (outcomes["loads"][0] == "failed")
    result = call("verify", copied)
    assert result.code == 2 and len(result.out.splitlines()) == len(CHECKS)
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and f"of {len(CHECKS)} checks failed" in line


def test_a_cache_that_is_not_read_is_caught(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token and in one piece must agree, whoever wrote the graph."""
    feed = verify.Decoder.feed

    def forgetful(self: verify.Decoder, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        if len(ids) == 1:
            self.reset()
        return feed(self, ids, keep)

    monkeypatch.setattr(verify.Decoder, "feed", forgetful)
    state, detail = outcome(copied)["generates"]
    assert state == "failed" and "token by token" in detail


def test_the_light_base_is_enough(made: tuple[Artifact, Artifact]) -> None:
    """Without torch, transformers and onnx: what needs them is reported as not checked."""
    code = f"import sys; sys.modules.update(dict.fromkeys({LIGHT}))\n{MAIN}"
    arguments = ["verify", str(made[1].path), "--original", str(made[0].path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0 and not done.stderr, done.stderr
    states = {line[13:].partition(":")[0]: line for line in done.stdout.splitlines()}
    for name, package in (("graph", "onnx"), ("parity", "torch")):
        assert states.pop(name).startswith(f"not checked  {name}: needs a package: {package} is not installed; ")
    assert len(states) == 5 and all(line.startswith("ok ") for line in states.values())


@pytest.mark.families
def test_portable_and_unquantized(random_model: Callable, text: Path, tmp_path: Path) -> None:
    """A float model in the portable graph: exported straight from a plain checkpoint, it equals that one."""
    folder = random_model(LlamaConfig(**{**TINY, "num_hidden_layers": 1}, tie_word_embeddings=True), tmp_path / "model")
    made = stages.run("export", Artifact.load(folder), tmp_path / "onnx", ExportOptions(exporter="portable", text=text))
    outcomes = outcome(made.path, original=folder, text=text)
    assert {state for state, _ in outcomes.values()} == {"ok"}, outcomes
    assert "equals model at float activations" in outcomes["parity"][1] and "KL" not in outcomes["parity"][1]
