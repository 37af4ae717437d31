"""Folders of strangers: what would run code, or is a link to a file elsewhere, is refused in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.load import read_config
from edgepress.pipeline.errors import ModelError
from refusal import Copy, Refused, command

CODE: dict[str, dict[str, object]] = {
    "model": {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
    "config": {"auto_map": {"AutoConfig": "somebody/else--own.Own"}},
    "in a part": {"text_config": {"auto_map": {"AutoConfig": "own.Own"}}},
    "kernel of a repository": {"attn_implementation": "somebody/kernel"},
    "hidden kernel": {"_attn_implementation": "somebody/kernel@main"},
    "kernel of a part": {"attn_implementation": {"": "sdpa", "text": "somebody/kernel"}},
    "experts": {"vision_config": [{"experts_implementation": "somebody/kernel"}]},
}


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_config(case: str, copy_of: Copy, tiny: Path, refused: Refused, tmp_path: Path) -> None:
    folder = copy_of(tiny, **CODE[case])
    refused(*command("quantize", folder, tmp_path / "out"), says=("Python code", "--trust-remote-code"))
    with pytest.raises(ModelError, match="Python code"):  # the door of the models that no stage takes as its source
        read_config(folder)
    check_checkpoint(folder, trust_remote_code=True)


def test_a_config_for_another_version(copy_of: Copy, tiny: Path, refused: Refused, tmp_path: Path) -> None:
    """Transformers would read config.5.0.0.json, and edgepress's own reading config.json: two models in one folder."""
    folder = copy_of(tiny, configuration_files=["config.5.0.0.json", "config.json"])
    refused(*command("quantize", folder, tmp_path / "out"), says=("configuration_files", "delete that key"))
    check_checkpoint(copy_of(tiny, "same", configuration_files=["config.json"]), trust_remote_code=False)


@pytest.mark.parametrize(
    "name", ["LICENSE", "notes.json", "x.py", "vocab.txt", "tokenizer.json", "additional_chat_templates/default.jinja"]
)
def test_links_out_of_the_folder(name: str, copy_of: Copy, tiny: Path, refused: Refused, tmp_path: Path) -> None:
    """Else an archive could make edgepress copy any file of the reader's into an artifact that is then published."""
    folder = copy_of(tiny)
    (tmp_path / "secret.txt").write_text("SECRET")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret.txt")
    refused(*command("quantize", folder, tmp_path / "out"), says=(Path(name).name, "secret.txt", "cp -rL"))


def test_links_that_may_be(copy_of: Copy, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within the folder, of the folder itself, and of weights that lie elsewhere, which the log names once."""
    folder = copy_of(tiny)
    (folder / "LICENSE").write_text("MIT")
    (folder / "LICENSE.txt").symlink_to("LICENSE")
    (folder / "model.safetensors").rename(tmp_path / "big.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
    (tmp_path / "link").symlink_to(folder)
    caplog.set_level(logging.INFO, "edgepress")
    for _ in range(2):
        check_checkpoint(tmp_path / "link", trust_remote_code=False)
    assert len(caplog.messages) == 1 and "big.safetensors" in caplog.text


def test_links_of_a_hub_cache(tiny: Path, tmp_path: Path) -> None:
    """Every file of a snapshot is a link to a blob of the same model, and to nothing else."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    check_checkpoint(snapshot, trust_remote_code=False)
    (tmp_path / "secret").write_text("SECRET")
    (blobs / "secret").symlink_to(tmp_path / "secret")  # a blob that is a link itself
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(ModelError, match="LICENSE is a link"):
        check_checkpoint(snapshot, trust_remote_code=False)


def test_code_is_not_carried_along(copy_of: Copy, tiny: Path, tmp_path: Path, call: Callable) -> None:
    """A tokenizer or generation config that names code is carried without; what transformers reads is the same tokenizer."""
    from transformers import AutoTokenizer

    folder = copy_of(tiny)
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time").input_ids
    ran = f"open({str(tmp_path / 'RAN')!r}, 'w').close()\n"
    (folder / "own.py").write_text(ran)
    for name in ("tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        brought = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}} | ({"tokenizer_class": "Own"} if "tok" in name else {})
        (folder / name).write_text(json.dumps(content | brought))
    result = call("quantize", folder, tmp_path / "out", "--method", "rtn")
    assert result.code == 0, result.err
    assert not (tmp_path / "RAN").exists() and not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*_config.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon a time").input_ids == ids
