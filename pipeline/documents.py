"""The door that JSON and YAML come in by: bounded and unambiguous as plain data, then typed as a dataclass.

Every fault is a DocumentError, a ValueError of one line, which the reader of a file turns into the error that names it: the text
fits behind "is".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from edgepress.pipeline.visible import one_line

if TYPE_CHECKING:
    import yaml

Value = TypeVar("Value")
# What a JSON object holds whose keys are not ours: config.json of any model, tokenizer_config.json.
JsonObject = dict[str, Any]
# The largest documents known (headers of models with 100,000 tensors, tokenizer configs) stay far below it.
MAX_BYTES = 64 << 20
MAX_VALUES = 2_000_000  # each is an object of Python, and a document is read more than once
MAX_YAML = 1 << 16  # bytes of a recipe; YAML takes a second for each 100,000
MAX_DEPTH = 64  # Python's own recursion ends at 1,000, and copying a document takes several frames for each level
MAX_YAML_NODES = 10_000  # a recipe has about fifty; aliases of aliases have billions
_SHOWN = 120  # characters of a value that a message repeats


class DocumentError(ValueError):
    """A document that is not what it should be; its text is one line without the name of the file."""


def parse_json(content: bytes | str) -> object:
    """Plain data from JSON (RFC 8259) in UTF-8, read as one reader and the next agree on.

    Raises DocumentError for what is no JSON, for more than MAX_BYTES, MAX_VALUES or MAX_DEPTH, a key that stands twice in an
    object, NaN, Infinity or a number that rounds to it, a number of more than 4,300 digits, and for halves of surrogate pairs.
    """
    if len(content) > MAX_BYTES:
        raise DocumentError(f"too large ({len(content):,} bytes or more; at most {MAX_BYTES:,} are read)")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        if sum(map(text.count, ",[{")) > MAX_VALUES:  # before each value, except the first, stands one of them
            raise DocumentError(f"too large (more than {MAX_VALUES:,} values)")
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except DocumentError:
        raise
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are two
        raise DocumentError(f"not valid JSON ({short_line(str(error).partition('; use sys')[0])})") from None
    check_plain(value)
    return value


def parse_object(content: bytes | str) -> JsonObject:
    """``parse_json`` of a document that is an object."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise DocumentError("not a JSON object")
    return value


def parse_yaml(content: bytes) -> object:
    """Plain data from YAML in UTF-8, with YAML's own dates, under like bounds; aliases count for what they stand for.

    Raises DocumentError.
    """
    import yaml

    if len(content) > MAX_YAML:
        raise DocumentError(f"too large ({len(content):,} bytes or more; at most {MAX_YAML:,} are read)")
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_YAML_NODES:
            raise DocumentError(f"too large (more than {MAX_YAML_NODES:,} values with its aliases written out)")
        value: object = loader.construct_document(node)
    except DocumentError:
        raise
    except UnicodeDecodeError as error:
        raise DocumentError(f"not UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise DocumentError(_TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise DocumentError(f"not valid YAML ({short_line(str(error.problem))}{line})") from None
    except yaml.YAMLError as error:
        raise DocumentError(f"not valid YAML ({short_line(str(error))})") from None
    except Exception as error:  # a tag's constructor raises what it likes for a malformed value
        raise DocumentError(f"not valid YAML (a value does not fit its type: {short_line(str(error))})") from None
    check_plain(value)
    return value


def typed(kind: type[Value], value: object, name: str = "it") -> Value:
    """Plain data as ``kind``: a dataclass, a tuple, a dict, a union, or a type of JSON itself. Unknown keys are ignored.

    Raises DocumentError that says where below ``name`` what is missing or of the wrong type (it does not fit behind "is").
    """
    import msgspec  # takes 15 ms, which --help does without

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise DocumentError(f"{name}{place.rstrip('`')}: {short_line(reason)}") from None


def check_plain(value: object) -> None:
    """Raise DocumentError for data nested too deeply, numbers that are not finite and text that is not Unicode."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inner(item)]
        if not level:
            return
    raise DocumentError(_TOO_DEEP)


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def _inner(value: object) -> Iterable[object]:
    """What a value holds, after a check of the value itself."""
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise DocumentError("not finite (it holds a number that is infinite or none)")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DocumentError("not Unicode (it holds half of a surrogate pair)") from None
    return ()


def _object(pairs: list[tuple[str, object]]) -> JsonObject:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DocumentError(f"ambiguous (the key {shown(twice)} stands twice in one object)")
    return content


def _no_number(name: str) -> object:
    raise DocumentError(f"not valid JSON (it holds {name})")


def _size(node: yaml.Node, known: dict[int, int], depth: int = 0) -> int:
    """Nodes below a node of YAML, those behind an alias as often as it stands. Raises DocumentError for one inside itself."""
    import yaml

    if depth > MAX_DEPTH:
        raise DocumentError(_TOO_DEEP)
    if id(node) not in known:
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise DocumentError(f"ambiguous (the key {shown(twice)} stands twice)")
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        known[id(node)] = 1 + sum(_size(part, known, depth + 1) for part in below)
    return known[id(node)]


def short_line(text: str, most: int = 480) -> str:
    """A text for a message: its lines joined, cut behind ``most`` characters, what does not print spelt out."""
    text = " ".join(text.split())
    return one_line(text if len(text) <= most else f"{text[:most]} ...")


def shown(value: object) -> str:
    """A value as a message repeats it, quoted and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
