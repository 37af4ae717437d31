"""What the runtime reads and renders is what transformers does, token for token, whichever file or class knows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_styles import ALPACA, CHATML, STYLES, tokenizer, write
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import write_json
from edgepress.pipeline.runtime.chat import end_of_turn
from edgepress.pipeline.runtime.chat_template import read_template
from edgepress.pipeline.text.tokenizer import OWN_CLASS, resolved
from edgepress.pipeline.text.windows import load_tokenizer
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, TOKENIZER_MAPPING_NAMES

CHATS = [
    [{"role": "user", "content": "  Who are you?\n"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Naïve <s> 12345  spaces\tand 日本語?"},
        {"role": "assistant", "content": "I'm here."},
        {"role": "user", "content": "Then tell me: <|im_end|></s> [INST] why?"},
    ],
]
TEXTS = ["The girl went down to the river.", " 12345 naïve\n\n\n  日本語 <|im_end|></s>don't", ""]


def carried(source: Path, out: Path) -> Path:
    """The tokenizer's files of an artifact."""
    out.mkdir()
    carry_files(source, out, trusted=False)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    (out / "model.onnx").touch()
    return out


@pytest.mark.parametrize("style", STYLES)
def test_chats_and_texts_become_the_ids_of_transformers(style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder as it is given, and of the artifact's files, for which transformers is not asked."""
    source = tmp_path / "source"
    source.mkdir()
    STYLES[style](source)
    truth = AutoTokenizer.from_pretrained(source)
    before = load_tokenizer(source)
    out = carried(source, tmp_path / "out")
    monkeypatch.setattr("edgepress.pipeline.text.tokenizer._load", None)
    after, template = load_tokenizer(out), read_template(out)
    assert template is not None
    for text in TEXTS:
        assert before.encode(text).ids == after.encode(text).ids == truth(text)["input_ids"]
    for chat in CHATS:
        for answer in (True, False):
            assert template.render(chat, answer) == truth.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
            ids = truth.apply_chat_template(chat, add_generation_prompt=answer)["input_ids"]
            assert after.encode(template.render(chat, answer), add_special_tokens=False).ids == ids
    assert end_of_turn(out, after) == ({truth.eos_token_id} if truth.eos_token else set())
    again = AutoTokenizer.from_pretrained(out)  # what was written means the same to transformers
    assert again.special_tokens_map == truth.special_tokens_map
    assert again.apply_chat_template(CHATS[1])["input_ids"] == truth.apply_chat_template(CHATS[1])["input_ids"]


def test_files_that_say_all_are_read_without_transformers(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepress.pipeline.text.tokenizer._load", None)
    assert resolved(reference) is None


def test_model_types_with_a_class_of_their_own() -> None:
    """The list in tokenizer.py is this transformers'."""
    general = {"TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend"}
    classes = {name: TOKENIZER_MAPPING_NAMES.get(name) for name in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS}
    assert {name for name, made in classes.items() if made and made.removesuffix("Fast") not in general} == OWN_CLASS


def test_a_tokenizer_that_only_its_own_code_can_make(tmp_path: Path) -> None:
    """The code is not run; tokenizer.json is there and is read."""
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "chat_template": CHATML}
    write(tmp_path, tokenizer("bytes", ("<|im_start|>",)), settings)
    (tmp_path / "mine.py").write_text("raise SystemExit('this code ran')")
    assert load_tokenizer(tmp_path).encode("<|im_start|>").ids == [600]


@pytest.mark.parametrize("files", [{}, {"tokenizer.model": b"not a sentencepiece model"}])
def test_no_tokenizer_that_can_be_read(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        load_tokenizer(tmp_path)


def sentencepiece_model() -> bytes:
    """A vocabulary of bytes, letters and a few pieces, as SentencePiece stores it."""
    made = import_protobuf().ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(piece, 1) for piece in ("▁t", "he", "▁the", "in", "▁w", "er", "▁do", "wn", *map(chr, range(33, 127)), "▁")]
    for number, (piece, kind) in enumerate(pieces):
        made.pieces.add(piece=piece, score=-float(number), type=kind)
    made.trainer_spec.model_type, made.trainer_spec.byte_fallback = 2, True  # BPE
    return bytes(made.SerializeToString())


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    """Made into a tokenizer.json where sentencepiece is there; else refused with the cure."""
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenizer.model").write_bytes(sentencepiece_model())
    if find_spec("sentencepiece") is None:
        with pytest.raises(ModelError, match=r"sentencepiece is not installed\); pip install sentencepiece"):
            load_tokenizer(source)
        return
    truth = AutoTokenizer.from_pretrained(source)
    out = carried(source, tmp_path / "out")
    for text in TEXTS:
        assert load_tokenizer(source).encode(text).ids == load_tokenizer(out).encode(text).ids == truth(text)["input_ids"]


def test_templates_without_a_default(tmp_path: Path) -> None:
    """Transformers refuses to choose, and so do we."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": [{"name": "rag", "template": ALPACA}]}
    write(tmp_path, tokenizer("bytes", ()), settings)
    assert read_template(tmp_path) is None and resolved(tmp_path) is not None


@pytest.mark.parametrize(("name", "read"), [("GPT2Tokenizer", False), ("Qwen2Tokenizer", False), ("CTRLTokenizer", True)])
def test_files_that_git_lfs_has_not_fetched(name: str, read: bool, tiny: Path, copy_of: Callable[..., Path]) -> None:
    """Beside a tokenizer.json they matter to the few classes alone that read them all the same."""
    folder = copy_of(tiny)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name})
    before = None if read else resolved(folder)
    (folder / "vocab.json").write_bytes(b"\xef\xbb\xbf{}")
    for pointer in ("merges.txt", "tekken.json", "a.tiktoken", "tokenizer.model"):
        (folder / pointer).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    check_checkpoint(folder, False)
    if read:
        with pytest.raises(ModelError, match="is a git-LFS pointer"):
            resolved(folder)
    else:
        assert before is not None and resolved(folder) == before
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="is a git-LFS pointer"):
        check_checkpoint(folder, False)
