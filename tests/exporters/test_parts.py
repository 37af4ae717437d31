"""Parts of blocks that are gone: graphs without them and their caches, proven against the checkpoint with zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from edgepress.exporters import architecture, fused
from edgepress.exporters.proof import parity
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import read_json
from edgepress.pipeline.options import ExportOptions, PruneOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder
from edgepress.pipeline.text.windows import text_windows
from families import LAYERS, WINDOW, family_config
from transformers import PreTrainedModel

FUSED = [name for name, family in architecture.FAMILIES.items() if family.fused]
# Block 5 lacks both parts; the first block and the last one of them.
WITHOUT_ATTENTION, WITHOUT_FEED_FORWARD = (0, 2, 5), (5, 6)
ATTENDING = [index for index in range(LAYERS) if index not in WITHOUT_ATTENTION]
# The attention window of each layer of a whole model, as the architectures define it: -1 for all tokens.
LOCAL = {
    "mistral": range(LAYERS), "phi3": range(LAYERS), "qwen2": range(4, LAYERS),
    "gemma2": range(0, LAYERS, 2), "gemma3_text": range(0, LAYERS, 2),
}  # fmt: skip
Model = Callable[..., Path]


def without_parts(source: Path, out: Path, text: Path) -> Artifact:
    """The model without these parts, by prune."""
    made = Artifact.load(source)
    for part, gone in (("attention", WITHOUT_ATTENTION), ("feed-forward", WITHOUT_FEED_FORWARD)):
        options = PruneOptions(parts=part, remove_layers=gone, calibration=text, calibration_tokens=256)
        made = stages.run("prune", made, out / part, options)
    return made


def check(name: str, source: Artifact, artifact: Artifact) -> None:
    """Proven in every reading; nothing of what is gone is in the graph, and the caches are numbered without gaps."""
    exact = artifact.steps[-1].facts["parity"][0]
    assert all(exact[f"difference_{reading}"] < parity.TOLERANCE for reading in ("whole", "chunks", "steps", "batch"))
    graph = ir.load(artifact.path / "model.onnx").graph
    silent = Checkpoint(source.path).silent
    assert len(silent) == len(WITHOUT_ATTENTION) + len(WITHOUT_FEED_FORWARD)
    rows = {part: norms for part, *norms in architecture.FAMILIES[name].sublayers()}
    places = [part.rpartition(".") for part in silent]
    norms = [f"{block}.{norm}" for block, _, part in places for norm in rows[part] if norm]
    gone = [f"{module}." for module in (*silent, *norms)]
    assert not [value for value in graph.initializers if any(module in value for module in gone)]
    caches = [value.name for value in graph.inputs if str(value.name).startswith("past_key_values")]
    assert caches == [f"past_key_values.{i}.{part}" for i in range(len(ATTENDING)) for part in ("key", "value")]
    assert read_json(artifact.path / "genai_config.json")["model"]["decoder"]["num_hidden_layers"] == len(ATTENDING)
    assert read_json(artifact.path / "config.json")["num_hidden_layers"] == LAYERS  # as plain transformers has it
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if artifact.steps[-1].facts["exporter"] == "fused":
        windows = [WINDOW if index in LOCAL.get(name, ()) else -1 for index in ATTENDING]
        assert [node.attributes["local_window_size"].as_int() for node in attention] == windows


@pytest.mark.parametrize(
    ("exporter", "name"),
    [
        ("fused", "gemma3_text"),
        *(pytest.param("fused", name, marks=pytest.mark.families) for name in FUSED if name != "gemma3_text"),
        *(pytest.param("portable", name, marks=pytest.mark.families) for name in ("llama", "gemma3_text")),
    ],
)
def test_nothing_of_a_part_that_is_gone_is_exported(
    exporter: str, name: str, random_model: Model, tmp_path: Path, text: Path
) -> None:
    pruned = without_parts(random_model(family_config(name), tmp_path / "model"), tmp_path, text)
    packed = stages.run("quantize", pruned, tmp_path / "packed", QuantizeOptions(method="rtn", group_size=32))
    options = ExportOptions(exporter=exporter, text=text, accuracy_level=0)  # type: ignore[arg-type]
    check(name, packed, stages.run("export", packed, tmp_path / "onnx", options))


def test_the_portable_exporter_leaves_the_model_as_it_was(random_model: Model, tmp_path: Path, text: Path) -> None:
    """Its logits are the reference of the proof, computed after the trace."""
    from edgepress.exporters.portable import _without_parts

    pruned = without_parts(random_model(family_config("llama"), tmp_path / "model"), tmp_path, text)
    checkpoint = Checkpoint(pruned.path)
    model, ids = checkpoint.model(), torch.arange(9)[None]

    def computed(model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids).logits

    before, numbers = computed(model), [block.self_attn.layer_idx for block in model.model.layers]
    with _without_parts(model, checkpoint.silent):
        assert torch.equal(computed(model), before)
    assert [block.self_attn.layer_idx for block in model.model.layers] == numbers
    assert torch.equal(computed(model), before)


def test_a_wrong_layer_is_named_though_parts_are_gone(
    random_model: Model, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 5 has no output of its own in the graph; those behind it keep their numbers."""
    window = fused.window
    monkeypatch.setattr(fused, "window", lambda config, index: -1 if index == 6 else window(config, index))
    pruned = without_parts(random_model(family_config("gemma3_text"), tmp_path / "model"), tmp_path, text)
    options = ExportOptions(exporter="fused", text=text, accuracy_level=0)  # type: ignore[arg-type]
    with pytest.raises(ProofError, match="layer 6 is the first that differs"):
        stages.run("export", pruned, tmp_path / "onnx", options)


def test_it_decodes_what_the_checkpoint_decodes(random_model: Model, tmp_path: Path, text: Path) -> None:
    pruned = without_parts(random_model(family_config("llama"), tmp_path / "model"), tmp_path, text)
    options = ExportOptions(text=text, accuracy_level=0)  # type: ignore[arg-type]
    made = stages.run("export", pruned, tmp_path / "onnx", options)
    prompt = text_windows(text, pruned.path, budget=20)[0]
    tokens = list(Decoder(made.path).greedy(prompt, 12))
    model = load_model(pruned.path)
    ids = torch.from_numpy(prompt)[None]
    wanted = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert tokens == np.asarray(wanted[0, len(prompt) :]).tolist()
