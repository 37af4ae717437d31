"""The layout for transformers.js: the weights lie below onnx/ once, and everybody else reads the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.exporters import node_layout
from edgepress.exporters.proof.recheck import at_level_0
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.stage import size
from edgepress.pipeline.bench.subject import Subject, report_steps
from edgepress.pipeline.errors import ProofError
from edgepress.pipeline.files import files_below, folder_bytes, read_json
from edgepress.pipeline.options import NODE, ExportOptions, QuantizeOptions
from edgepress.pipeline.runtime.decoder import Decoder

IDS = np.arange(5, 40)


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    options = QuantizeOptions(method="rtn", group_size=32)
    return stages.run("quantize", Artifact.load(tiny), tmp_path_factory.mktemp("packed") / "packed", options)


@pytest.fixture(scope="module")
def both(packed: Artifact, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The artifact, plain and laid out."""
    out = tmp_path_factory.mktemp("made")
    plain = stages.run("export", packed, out / "plain", ExportOptions(text=text, accuracy_level="4"))
    laid = stages.run("export", packed, out / "laid", ExportOptions(text=text, accuracy_level="4", layout=NODE))
    return plain.path, laid.path


def test_the_weights_are_there_once_and_the_graphs_compute_the_same(both: tuple[Path, Path]) -> None:
    plain, laid = both
    assert {str(p.relative_to(laid)) for p in files_below(laid)} >= {"model.onnx", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}
    assert not (laid / "model.onnx.data").exists()
    assert (laid / "onnx" / "model_q4.onnx_data").read_bytes() == (plain / "model.onnx.data").read_bytes()
    truth = Decoder(plain).feed(IDS, keep=0)
    for file in ("model.onnx", "onnx/model_q4.onnx"):
        assert np.array_equal(Decoder(laid, model=file).feed(IDS, keep=0), truth)
    graph = ir.load(laid / "onnx" / "model_q4.onnx").graph
    tensors = [value.const_value for value in graph.initializers.values()]
    assert {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)} == {"model_q4.onnx_data"}
    config = read_json(laid / "config.json")
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}


def test_its_bytes_are_all_counted(both: tuple[Path, Path]) -> None:
    """In the size that a report gives, too, which else would be that of the graph alone."""
    plain, laid = both
    all_of_it = sum(p.stat().st_size for p in files_below(laid))
    assert folder_bytes(laid) == all_of_it
    extra = (laid / "onnx" / "model_q4.onnx").stat().st_size
    assert 0 <= folder_bytes(laid) - folder_bytes(plain) - extra < 2000
    figures, others = (size(Subject(artifact, "one", report_steps(artifact), ())) for artifact in map(Artifact.load, (laid, plain)))
    assert figures["size.total_bytes"].median == all_of_it
    assert figures["size.bits_per_weight"].median > others["size.bits_per_weight"].median


def test_what_stands_below_onnx_in_another_folder_is_not_counted(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Many checkpoints on the hub carry such a folder."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"{}")
    assert folder_bytes(tmp_path) == 2


def test_it_is_verified_and_rechecked(both: tuple[Path, Path], call: Callable[..., object], tmp_path: Path) -> None:
    plain, laid = both
    call("verify", laid)
    other = tmp_path / "other"
    (tmp_path / "laid").mkdir()
    other.mkdir()
    wanted = at_level_0(plain, other).feed(IDS, keep=0)
    assert np.array_equal(at_level_0(laid, tmp_path / "laid").feed(IDS, keep=0), wanted)


@pytest.mark.parametrize(("bits", "name"), [(8, "model_quantized.onnx"), (16, "model.onnx")])
def test_the_name_says_the_bits(bits: int, name: str, tiny: Path, tmp_path: Path, text: Path) -> None:
    made = Artifact.load(tiny)
    if bits == 8:
        made = stages.run("quantize", made, tmp_path / "packed", QuantizeOptions(method="rtn", bits=8, group_size=32))
    laid = stages.run("export", made, tmp_path / "laid", ExportOptions(text=text, layout=NODE)).path
    assert (laid / "onnx" / name).is_file() and (laid / "onnx" / f"{name}_data").is_file()


def test_nf4_has_a_name_of_its_own(tiny: Path, tmp_path: Path, text: Path) -> None:
    """Not fp32, which it was called, for its matrices are in another operator."""
    packed = stages.run("quantize", Artifact.load(tiny), tmp_path / "packed", QuantizeOptions(method="nf4", head_bits=16))
    laid = stages.run("export", packed, tmp_path / "laid", ExportOptions(text=text, layout=NODE))
    assert (laid.path / "onnx" / "model_bnb4.onnx").is_file()
    assert read_json(laid.path / "config.json")["transformers.js_config"]["dtype"] == "bnb4"


def test_a_layout_that_computes_something_else_is_not_written(
    packed: Artifact, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two weights of one shape that changed places: the proof before could not see it."""
    point = node_layout._point

    def crossed(graph: ir.Model, location: str, base: Path) -> None:
        point(graph, location, base)
        if location.startswith("model"):
            one, other = (graph.graph.initializers[f"model.layers.{i}.mlp.down_proj.B"] for i in (0, 1))
            one.const_value, other.const_value = other.const_value, one.const_value

    monkeypatch.setattr(node_layout, "_point", crossed)
    with pytest.raises(ProofError, match=r"^model\.onnx does not compute"):
        stages.run("export", packed, tmp_path / "laid", ExportOptions(text=text, layout=NODE))
    assert not (tmp_path / "laid").exists()
