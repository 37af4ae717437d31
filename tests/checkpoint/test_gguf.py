"""GGUF files as sources: the weights are the file's, the tokenizer is the model's, and damaged ones end in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import weight_file
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.errors import InputError, ModelError
from edgepress.pipeline.machine import working_within
from edgepress.pipeline.options import ImportOptions
from edgepress.pipeline.text.windows import load_tokenizer
from gguf import GGMLQuantizationType
from gguf_files import write_gguf


def imported(file: Path, out: Path) -> Artifact:
    return stages.run("import", Artifact.load(file), out, ImportOptions())


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
def test_the_weights_are_the_files(kind: GGMLQuantizationType, reference: Path, tmp_path: Path) -> None:
    weights = write_gguf(reference, tmp_path / "model.gguf", kind)
    artifact = imported(tmp_path / "model.gguf", tmp_path / "out")
    state = load_model(artifact.path).state_dict()
    for name, weight in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), weight, err_msg=name)
    assert artifact.format == "hf" and set(artifact.steps[-1].facts["types"]) == {kind.name, "F32"}


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0])
def test_the_weights_are_the_files_without_memory_for_them(
    kind: GGMLQuantizationType, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in a file meanwhile, and go into several."""
    opened, real = list[int](), weight_file.WeightFile
    monkeypatch.setattr(weight_file, "WeightFile", lambda size: (opened.append(size), real(size))[1])
    weights = write_gguf(reference, tmp_path / "model.gguf", kind)
    with working_within(1_000_000):
        artifact = imported(tmp_path / "model.gguf", tmp_path / "out")
    assert opened and opened[0] >= 4 * max(weight.size for weight in weights.values())
    state = load_model(artifact.path).state_dict()
    for name, weight in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), weight, err_msg=name)


@pytest.mark.parametrize("codes", [False, True])
def test_the_file_is_parsed_once(codes: bool, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vocabulary of 262,144 that takes 13 s, and whoever of transformers needs something does it again."""
    write_gguf(reference, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    parsed, real = list[object](), gguf.GGUFReader.__init__
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, *given: (parsed.append(given), real(self, *given))[1])
    stages.run("import", Artifact.load(tmp_path / "model.gguf"), tmp_path / "out", ImportOptions(keep_codes=codes))
    assert len(parsed) == 1


def test_texts_become_the_same_tokens(reference: Path, text: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model.gguf")
    own = load_tokenizer(imported(tmp_path / "model.gguf", tmp_path / "out").path)
    prose = text.read_text()[:4000]
    assert own.encode(prose, add_special_tokens=False).ids == load_tokenizer(reference).encode(prose, add_special_tokens=False).ids


def test_what_lies_beside_the_file_is_not_read(reference: Path, tmp_path: Path) -> None:
    """Transformers would ask whether to run the code of that tokenizer, and take that config for the file's."""
    (folder := tmp_path / "downloads").mkdir()
    write_gguf(reference, folder / "model.gguf")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()")
    code = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("config", "tokenizer_config", "generation_config", "adapter_config"):
        (folder / f"{name}.json").write_text(json.dumps({"auto_map": code, "base_model_name_or_path": "somebody/else"}))
    artifact = imported(folder / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "RAN").exists() and not list(artifact.path.glob("*.py"))
    assert load_tokenizer(artifact.path).get_vocab() == load_tokenizer(reference).get_vocab()


def test_a_quantized_source_is_warned_of(reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "edgepress")
    write_gguf(reference, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    imported(tmp_path / "model.gguf", tmp_path / "out")
    assert any("quantized already (Q4_0)" in message for message in caplog.messages)


def test_every_stage_takes_a_gguf(
    reference: Path, tmp_path: Path, call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is imported once, into the cache."""
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    write_gguf(reference, tmp_path / "model.gguf")
    for out in ("a", "b"):
        result = call("quantize", tmp_path / "model.gguf", tmp_path / out, "--method", "rtn")
        assert result.code == 0, result.err  # type: ignore[attr-defined]
    assert "already done" in result.err  # type: ignore[attr-defined]
    (folder,) = (tmp_path / "cache" / "imports").iterdir()
    assert [step.stage for step in Artifact.load(tmp_path / "a").steps] == ["import", "quantize"] and folder.name.startswith(
        "model-"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_cut_short(share: float, reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(reference, file)
    with file.open("rb+") as opened:
        opened.truncate(int(share * file.stat().st_size))
    with pytest.raises(InputError, match=r"model.gguf is (damaged or cut short|not a GGUF file)"):
        imported(file, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("architecture", "says"), [("unheard-of", "transformers cannot convert model.gguf"), ("clip", "the vision part of a model")]
)
def test_an_architecture_that_cannot_be_converted(architecture: str, says: str, reference: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model.gguf", architecture=architecture)
    with pytest.raises(ModelError, match=says):
        imported(tmp_path / "model.gguf", tmp_path / "out")


def test_one_part_of_a_split_file(reference: Path, tmp_path: Path) -> None:
    write_gguf(reference, tmp_path / "model-00001-of-00002.gguf")
    with pytest.raises(InputError, match="one part of a split GGUF; join the parts"):
        imported(tmp_path / "model-00001-of-00002.gguf", tmp_path / "out")
