"""Seeded damage to JSON, bytes and safetensors files."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that goes into JSON as it is."""

    text: str


MARKUP = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
# What may stand anywhere in a document instead of what is meant.
ODD: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 31, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, "", " ", "x", "0", "-1",
    "nan",
    "../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", "\ud800", "\u202egnirts", "\x1b[31m\x1b]0;t\x07", "A" * 5000, "a\nb",
    MARKUP, r"$\frac{$", "$x", "{{ 7*7 }}", "%s%n", "é" * 300, [], {}, [[]], [None], [1, 2, 3], ["a"], {"a": 1}, {"": None}, [{}],
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), Raw("1" + "0" * 5000), Raw('{"a":1,"a":2}'),
    Raw("[" * 3000 + "]" * 3000), Raw('{"a":' * 3000 + "1" + "}" * 3000), Raw("[" * 100 + "]" * 100),
    Raw("[" + "0," * 50000 + "0]"),
    Raw('"\\ud83d"'), Raw(""), Raw("tru"), Raw("01"), Raw("1."), Raw("'x'"),
)  # fmt: skip


def dumped(value: object) -> str:
    """JSON, with what is Raw as it is."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dumped(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value)


def places(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, of long lists the first 40."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:40])) if isinstance(value, list) else []
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def changed(random_: random.Random, document: object, below: tuple[str, ...] = ()) -> Any:
    """A copy with one to three places changed, below the keys ``below`` where some are given."""
    copy = json.loads(json.dumps(document))
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        known = [place for place in places(copy) if place and place[: len(below)] == below]
        if not known:
            break
        *path, last = random_.choice(known)
        parent = copy
        for key in path:
            parent = parent[key]
        _change(random_, parent, last)
    return copy


def _change(random_: random.Random, parent: Any, key: Any) -> None:
    how, value = random_.random(), parent[key]
    if how < 0.12:
        del parent[key]
    elif how < 0.17 and isinstance(parent, dict):
        parent[random_.choice(["x", "", "__class__", f"{key} ", "\ud800", "a" * 9999])] = parent.pop(key)
    elif how < 0.5:
        parent[key] = _near(random_, value)
    else:
        parent[key] = random_.choice(ODD)


def _near(random_: random.Random, value: Any) -> object:
    """Another type, or nearly the same."""
    if isinstance(value, bool):
        return random_.choice([str(value), int(value), None, not value])
    if isinstance(value, int):
        return random_.choice([str(value), float(value), value + 1, value - 1, -value, value * 1000, [value], value // 2, 10**12])
    if isinstance(value, float):
        return random_.choice([str(value), -value, value * 1e300, Raw("NaN"), [value], 0])
    if isinstance(value, str):
        return random_.choice([value + "x", value[:-1], [value], {"a": value}, 1, value.upper(), f"../{value}", f"/{value}"])
    if isinstance(value, list):
        return random_.choice(
            [value[:-1], value + value, value[::-1], dict(enumerate(value)), "x", value * 50 if len(value) < 10 else 0]
        )
    return random_.choice([[], {}, "x", None, 5]) if value is not None else random_.choice(ODD)


def spoiled(random_: random.Random, content: bytes) -> bytes:
    """Bytes with bits flipped, cut out, put in, zeroed, or the end cut off."""
    data = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 5, 20])):
        if not data:
            break
        at, how = random_.randrange(len(data)), random_.random()
        if how < 0.5:
            data[at] ^= 1 << random_.randrange(8)
        elif how < 0.6:
            data[at] = random_.randrange(256)
        elif how < 0.72:
            del data[at : at + random_.choice([1, 4, 100, 10000])]
        elif how < 0.85:
            data[at:at] = random_.randbytes(random_.choice([1, 4, 64]))
        elif how < 0.93:
            del data[at:]
        else:
            data[at : at + 64] = bytes(64)
    return bytes(data)


def put(file: Path, content: bytes | str) -> None:
    """Replace a file, never through a link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def put_json(file: Path, value: object) -> None:
    put(file, dumped(value))


def edit_json(random_: random.Random, file: Path, below: tuple[str, ...] = ()) -> None:
    """Spoil a JSON file: its text, the whole document, or places in it."""
    how = random_.random()
    if how < 0.12:
        put(file, spoiled(random_, file.read_bytes()))
    elif how < 0.2:
        put_json(file, random_.choice(ODD))
    else:
        put_json(file, changed(random_, json.loads(file.read_text()), below))


def edit_safetensors(random_: random.Random, file: Path, below: tuple[str, ...] = ()) -> None:
    """Spoil a safetensors file: its header, the header's length, or its data."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = random_.random()
    if how < 0.1:
        put(file, spoiled(random_, content[:4000]) + content[4000:])
    elif how < 0.2:
        put(file, struct.pack("<Q", random_.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])) + content[8:])
    elif how < 0.3:
        put(
            file,
            content[: random_.randrange(len(content))] if random_.random() < 0.5 else content + bytes(random_.choice([1, 4096])),
        )
    elif how < 0.6:
        name = random_.choice([key for key in header if key != "__metadata__"])
        header[name][random_.choice(["dtype", "shape", "data_offsets"])] = random_.choice(
            [*ODD, [0, 0], [5, 1], [-8, -4], [0, 2**63], [2**32, 2**32, 0], [1.5, 2], "F8_E4M3", "I64", "F4", "BOOL", "F64", [1]]
        )
        _put_safetensors(file, dumped(header), data)
    elif how < 0.7:
        _put_safetensors(
            file, random_.choice(["[" * 5000 + "]" * 5000, '{"a":' * 20000 + "1" + "}" * 20000, "[]", "null", "", "{}"]), data
        )
    else:
        _put_safetensors(file, dumped(changed(random_, header, below)), data)


def _put_safetensors(file: Path, header: str, data: bytes) -> None:
    encoded = header.encode("utf-8", "surrogatepass")
    put(file, struct.pack("<Q", len(encoded)) + encoded + data)


def edit_metadata(random_: random.Random, file: Path, key: str) -> None:
    """Spoil the JSON that stands under a key of a safetensors file's metadata."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    described = changed(random_, json.loads(header["__metadata__"][key])) if random_.random() < 0.85 else random_.choice(ODD)
    header["__metadata__"][key] = dumped(described)
    _put_safetensors(file, json.dumps(header), content[8 + length :])
