"""A tokenizer.json as the pieces it knows: what each is made of and stands for, and the same tokenizer with fewer of them.

Byte-level BPE, BPE as sentencepiece has it, Unigram and WordPiece.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise

from edgepress.pipeline.documents import shown
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject
from tokenizers.pre_tokenizers import ByteLevel

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # what sentencepiece falls back to
_SPACE = "\u2581"  # sentencepiece's
_SUFFIX = "##"  # WordPiece's for what goes on within a word, unless the file has another


class Pieces:
    """The vocabulary of a tokenizer.json. Ids are those of the file; ``rows``: ids from here on have no row in the embedding.

    Raises ModelError for a kind that is not handled.
    """

    def __init__(self, content: JsonObject, rows: int) -> None:
        self.content, self.model = content, content["model"]
        self.kind = str(self.model.get("type") or ("BPE" if "merges" in self.model else "WordPiece"))
        if self.kind not in ("BPE", "Unigram", "WordPiece"):
            raise ModelError(f"its tokenizer is a {shown(self.kind)} model; only BPE, Unigram and WordPiece can be trimmed")
        if self.kind == "BPE" and (self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix")):
            raise ModelError("its BPE marks where a word begins or ends, which cannot be trimmed")
        vocab = self.model["vocab"]
        ids = {piece: number for number, (piece, _) in enumerate(vocab)} if self.kind == "Unigram" else dict(vocab)
        self.ids: dict[str, int] = {piece: number for piece, number in ids.items() if number < rows}
        self.added: dict[str, int] = {str(t["content"]): int(t["id"]) for t in content.get("added_tokens") or () if t["id"] < rows}
        self.needed = frozenset(_ids_in(content.get("post_processor")))  # put around every text
        if beyond := [number for number in self.needed if number >= rows]:
            raise ModelError(
                f"its tokenizer puts the token {max(beyond)} around a text, beyond the {rows} rows of the embedding; correct its "
                "tokenizer.json"
            )
        self.names = {number: piece for piece, number in {**self.ids, **self.added}.items()}
        self.byte_level = _mentions(content, "ByteLevel")

    @cached_property
    def base(self) -> frozenset[int]:
        """What any text may need: bytes, characters, the unknown token, and added tokens that are not mere reserves."""
        always = {number for name, number in self.added.items() if not re.search("unused|reserved", name, re.IGNORECASE)}
        always |= {number for piece, number in self.ids.items() if _BYTE.fullmatch(piece) or len(self._bare(piece)) == 1}
        unknown = self.model.get("unk_token", self.model.get("unk_id"))
        if unknown is not None:
            always.add(unknown if isinstance(unknown, int) else self.ids.get(unknown, self.added.get(unknown, 0)))
        return frozenset(always | (self.needed & self.names.keys()))

    @property
    def loses_nothing(self) -> bool:
        """Whether every character can be written in bytes."""
        return self.byte_level or bool(self.model.get("byte_fallback"))

    def text(self, number: int) -> str | None:
        """What a piece stands for; None where its bytes are no whole characters."""
        piece = self.names[number]
        if number in self._added_ids:
            return piece
        if not self.byte_level:
            return None if _BYTE.fullmatch(piece) else self._bare(piece).replace(_SPACE, " ")
        try:
            return None if (known := _written(piece)) is None else known.decode()
        except UnicodeDecodeError:
            return None

    def order(self, number: int) -> float:
        """What a tokenizer learnt first has the lowest: by log-probability where it has one, else by number."""
        is_scored = self.kind == "Unigram" and number in self._of_model
        return -float(self.model["vocab"][number][1]) if is_scored else float(number)

    def parts(self, number: int) -> frozenset[int]:
        """A piece, and all that merging goes through to make it of its characters; itself alone where nothing is merged.

        That is so in any text where the piece is found: no merge crossed its borders, or it would not be there. Empty for a piece
        that no text has: what fills an embedding up.
        """
        if self.kind != "BPE" or number not in self._of_model or number in self._added_ids:
            return frozenset((number,))
        symbols, made = self._symbols(self.names[number]), {number}
        made.update(self.ids[symbol] for symbol in symbols if symbol in self.ids)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, _NEVER) for pair in pairwise(symbols)]
            if (best := min(ranks)) == _NEVER:
                break
            place = ranks.index(best)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            made.add(self.ids[symbols[place]])
        return frozenset(made) if len(symbols) == 1 or self.model.get("ignore_merges") else frozenset()

    def reduced(self, kept: Collection[int]) -> tuple[JsonObject, list[int]]:
        """The tokenizer with the ``kept`` pieces alone, and their former ids in the order of the new ones.

        The pieces of its model come first, each part in the order that it had.
        """
        of_model = sorted(number for number in self._of_model if number in kept)
        former = of_model + sorted(number for number in self._added_ids if number in kept and number not in self._of_model)
        new = {number: place for place, number in enumerate(former)}
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [row for number, row in enumerate(self.model["vocab"]) if number in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new.get(model["unk_id"])
        else:
            model["vocab"] = {self._of_model[number]: new[number] for number in of_model}
        if self.kind == "BPE":
            there = model["vocab"]
            model["merges"] = [m for m in self.model["merges"] if all(p in there for p in (*_pair(m), "".join(_pair(m))))]
        added = [token | {"id": new[token["id"]]} for token in self.content.get("added_tokens") or () if token["id"] in new]
        # No text is padded or cut: what these name would be ids of the former vocabulary.
        content = self.content | {"model": model, "added_tokens": added, "padding": None, "truncation": None}
        content["post_processor"] = _renumbered(content.get("post_processor"), new)
        return content, former

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.added.values())

    @cached_property
    def _of_model(self) -> dict[int, str]:
        return {number: piece for piece, number in self.ids.items()}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        pairs = map(_pair, self.model["merges"])
        return {pair: rank for rank, pair in enumerate(pairs) if "".join(pair) in self.ids}

    def _symbols(self, piece: str) -> list[str]:
        """What merging begins with: characters, or their bytes where a character is no piece."""
        if not self.model.get("byte_fallback"):
            return list(piece)
        alone = ([c] if c in self.ids else [f"<0x{byte:02X}>" for byte in c.encode()] for c in piece)
        return [symbol for symbols in alone for symbol in symbols]

    def _bare(self, piece: str) -> str:
        """Without what says that it goes on within a word; a piece of bytes as the characters that they are."""
        if self.kind == "WordPiece":
            return piece.removeprefix(self.model.get("continuing_subword_prefix") or _SUFFIX)
        if self.byte_level and len(piece) > 1:
            try:
                return piece if (known := _written(piece)) is None else known.decode()
            except UnicodeDecodeError:
                return piece
        return piece


_NEVER = 1 << 62


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level tokenizers write them: printable ones as they are, the others from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
    assert set(table) == set(ByteLevel.alphabet())
    return table


_BYTES = _byte_alphabet()


def piece_bytes(piece: str) -> bytes | None:
    """The bytes that a piece of a byte-level or byte-fallback vocabulary stands for, None for another."""
    if _BYTE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return _written(piece) or None


def _written(piece: str) -> bytes | None:
    """The bytes that a byte-level piece writes, None where it has a character that stands for none."""
    return bytes(_BYTES[character] for character in piece) if all(character in _BYTES for character in piece) else None


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as older and as newer files have it."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _mentions(content: JsonObject, kind: str) -> bool:
    """Whether the tokenizer splits or decodes by this kind."""

    def types(part: object) -> Iterable[object]:
        if isinstance(part, Mapping):
            yield part.get("type")
            part = list(part.values())
        if isinstance(part, list):
            for item in part:
                yield from types(item)

    return kind in {*types(content.get("pre_tokenizer")), *types(content.get("decoder"))}


def _ids_in(part: object) -> Iterator[int]:
    """Ids that a post-processor names, as ``_renumbered`` finds them."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from value if key == "ids" else _ids_in(value)
    elif isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            yield part[1]
        else:
            for item in part:
                yield from _ids_in(item)


def _renumbered(part: object, new: Mapping[int, int]) -> object:
    """A post-processor with new ids: lists under ``ids``, and pairs of a token and its id."""
    if isinstance(part, Mapping):
        return {key: [new[i] for i in value] if key == "ids" else _renumbered(value, new) for key, value in part.items()}
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], new[part[1]]]
        return [_renumbered(item, new) for item in part]
    return part
