"""A tokenizer with fewer pieces, against the one that it was made from."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from chat_styles import tokenizer as styled
from edgepress.models import EVALUATION_TEXT, OTHER_TEXT
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.text.pieces import Pieces
from edgepress.pipeline.trim.choice import Wish, choose
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("byte-level BPE", "BPE with byte fallback", "Unigram", "WordPiece")
PROSE = EVALUATION_TEXT.read_text(encoding="utf-8")
MIXED = (
    "def f(x):\n\treturn [i ** 2 for i in range(x)]  # ünïcödé\n"
    "Привет, мир! 你好、世界。こんにちは 안녕하세요 שלום عالم नमस्ते\n"
    "emoji: 😀👩‍👩‍👧‍👦🇩🇪 e\u0301 \u00e9 control:\x00\x01\x07\x1b\x7f\u200b\u2028 tabs\t\t spaces    end   \n\n\n"
    "<|endoftext|> <s> </s> 1234567890 $%^&*() \U0001f9ff \ufffd"
)


@cache
def trained(kind: str) -> str:
    """The JSON of a tokenizer of a kind, with special tokens before and behind its own."""
    if kind == "byte-level BPE":
        return styled("bytes", ("<|endoftext|>", "<|im_start|>")).to_str()
    if kind == "BPE with byte fallback":
        return styled("spaces", (), bos="<s>").to_str()
    if kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<pad>", "<unk>", "<s>"], unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator([PROSE[:60_000]], trainer)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
        return made.to_str()
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        [PROSE[:60_000]], trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made.to_str()


def reduced(kind: str, count: int | None = None, text: str = "") -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The tokenizer, one of ``count`` pieces or of those that a text uses, and the former ids."""
    before = Tokenizer.from_str(trained(kind))
    pieces = Pieces(json.loads(trained(kind)), before.get_vocab_size())
    counts = np.bincount(before.encode(text or PROSE[:60_000]).ids, minlength=before.get_vocab_size())
    content, former = pieces.reduced(choose(pieces, Wish(counts, frozenset(), count, texts_stay=bool(text))))
    return before, Tokenizer.from_str(json.dumps(content)), former


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_kept_text_map_one_to_one(kind: str) -> None:
    text = PROSE[1000:1600]
    before, after, former = reduced(kind, text=text)
    assert len(former) < before.get_vocab_size()
    assert [former[number] for number in after.encode(text).ids] == before.encode(text).ids
    assert all(after.id_to_token(place) == before.id_to_token(number) for place, number in enumerate(former))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_any_text_decodes_to_what_it_did(kind: str, share: float) -> None:
    """At the fewest pieces, at half, and at nearly all."""
    fewest, size = len(reduced(kind, text=" ")[2]), len(trained_vocabulary(kind))
    before, after, former = reduced(kind, int(fewest + share * (size - 1 - fewest)) + 1)
    assert after.get_vocab_size() == len(former) < size
    for text in (MIXED, PROSE[:5000], OTHER_TEXT.read_text(encoding="utf-8")[:5000], "", " ", "\n"):
        wanted = before.decode(before.encode(text).ids, skip_special_tokens=False)
        found = after.decode(after.encode(text).ids, skip_special_tokens=False)
        assert found == wanted or (kind in ("Unigram", "WordPiece") and share < 0.5)  # these may lose a rare word to <unk>
    assert len(after.encode(PROSE[:5000]).ids) >= len(before.encode(PROSE[:5000]).ids)


def trained_vocabulary(kind: str) -> dict[str, int]:
    return Tokenizer.from_str(trained(kind)).get_vocab()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_merging_goes_through_stays(kind: str) -> None:
    """Without it the piece would be made no more: take one such piece out, and the text changes."""
    text = PROSE[2000:2400]
    before, _, former = reduced(kind, text=text)
    used, pieces = set(before.encode(text).ids), Pieces(json.loads(trained(kind)), before.get_vocab_size())
    between = {part for number in used for part in pieces.parts(number)} - used - pieces.base
    assert between <= set(former) and between
    content, without = pieces.reduced(frozenset(former) - between)
    broken = Tokenizer.from_str(json.dumps(content))
    assert [without[number] for number in broken.encode(text).ids] != before.encode(text).ids


def test_every_piece_that_stays_can_be_made() -> None:
    """A character of three bytes is merged of two first: without what lies between it would be a dead row."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(["你好世界老人静街道歩く " * 50, PROSE[:3000]], trainer)
    content, counts = json.loads(made.to_str()), np.zeros(420, dtype=np.int64)
    for wish in (Wish(counts, frozenset(), 330, texts_stay=False), Wish(counts, frozenset(), None, scripts=frozenset(["LATIN"]))):
        smaller, former = Pieces(content, 420).reduced(choose(Pieces(content, 420), wish))
        after = Pieces(smaller, len(former))
        assert all(after.parts(number) for number in after.names)
    assert Tokenizer.from_str(json.dumps(smaller)).decode(Tokenizer.from_str(json.dumps(smaller)).encode("老人").ids) == "老人"


def test_reserved_tokens_that_a_text_uses_stay() -> None:
    """Gemma's are pieces of the model and added tokens both."""
    content = json.loads(trained("byte-level BPE"))
    size = len(content["model"]["vocab"]) + len(content["added_tokens"])
    content["model"]["vocab"]["<unused7>"] = size
    content["added_tokens"].append(content["added_tokens"][0] | {"id": size, "content": "<unused7>"})
    counts = np.zeros(size + 1, dtype=np.int64)
    assert size not in choose(Pieces(content, size + 1), Wish(counts, frozenset()))
    counts[size] = 1
    assert size in choose(Pieces(content, size + 1), Wish(counts, frozenset()))


def test_what_stands_around_a_text_stays_or_is_refused() -> None:
    content = json.loads(trained("WordPiece"))
    content["post_processor"]["sep"] = ["[X]", 500]
    content["padding"] = {"strategy": "BatchLongest", "pad_id": 500}
    pieces = Pieces(content, 600)
    assert 500 in pieces.base and pieces.reduced(pieces.base)[0]["padding"] is None
    content["post_processor"]["sep"] = ["[X]", 600]
    with pytest.raises(ModelError, match="beyond the 600 rows"):
        Pieces(content, 600)


def test_special_tokens_keep_their_places() -> None:
    before, after, former = reduced("BPE with byte fallback", text="abc")
    assert after.encode("abc").tokens[0] == "<s>" and after.token_to_id("<s>") == former.index(before.token_to_id("<s>"))
    before, after, former = reduced("WordPiece", text="abc")
    assert [after.encode("abc").tokens[i] for i in (0, -1)] == ["[CLS]", "[SEP]"]


def test_pieces_that_no_text_has_are_no_pieces() -> None:
    """Some files fill the embedding up with names such as [PAD151665], which no merge makes."""
    content = json.loads(trained("byte-level BPE"))
    rows = len(content["model"]["vocab"]) + len(content["added_tokens"])
    content["model"]["vocab"]["[PAD602]"] = rows
    assert Pieces(content, rows + 1).parts(rows) == frozenset()


def test_tokens_without_a_row_are_left_out() -> None:
    content = json.loads(trained("byte-level BPE"))
    rows = len(content["model"]["vocab"]) + 1  # one added token has a row, one has none
    pieces = Pieces(content, rows)
    smaller, former = pieces.reduced(pieces.names.keys())
    assert len(former) == rows and [token["content"] for token in smaller["added_tokens"]] == ["<|endoftext|>"]


@pytest.mark.parametrize(("change", "says"), [
    ({"type": "WordLevel"}, "is a 'WordLevel' model"),
    ({"end_of_word_suffix": "</w>"}, "marks where a word begins or ends"),
])  # fmt: skip
def test_kinds_that_are_not_handled(change: dict[str, str], says: str) -> None:
    content = json.loads(trained("byte-level BPE"))
    content["model"].update(change)
    with pytest.raises(ModelError, match=says):
        Pieces(content, 1000)


@pytest.mark.families
@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_of_mixed_text(kind: str) -> None:
    """Code, several scripts, emoji and control characters, shuffled by a seed."""
    random = np.random.default_rng(0)
    words = (MIXED + PROSE[:20_000] + OTHER_TEXT.read_text(encoding="utf-8")).split(" ")
    text = " ".join(random.choice(np.array(words, dtype=object), 180_000))
    assert len(text.encode()) > 1_000_000
    size = len(trained_vocabulary(kind))
    before, after, _ = reduced(kind, size - 20)
    assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids)
