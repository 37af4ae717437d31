"""Dataclasses to plain JSON data and back, checked against their annotations."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Value = TypeVar("Value")


def to_plain(value: object) -> object:
    """Dataclasses become objects without their None fields, tuples become lists; the rest stays as it is."""
    if dataclasses.is_dataclass(value):
        return object_of(value)
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def object_of(value: object) -> dict[str, object]:
    """The JSON object of a dataclass, in the order of its fields; a field that is None is absent."""
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is not a dataclass")
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: to_plain(item) for name, item in fields.items() if item is not None}


def from_plain(kind: type[Value], value: object, name: str = "it") -> Value:
    """``value`` from JSON as ``kind``: a dataclass, a tuple, a dict, a union, or a type of JSON itself.

    Keys that ``kind`` does not know are ignored. Raises ValueError that names what is missing or of the wrong type.
    """
    return cast(Value, _read(kind, value, name))


def _read(kind: object, value: object, name: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value, name)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_dataclass(kind, value, name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # 8 and 8.0 are one number in JSON; written again it looks the same
    if kind is Any or (isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
        return value
    raise ValueError(f"{name} is {type(value).__name__}, not {getattr(kind, '__name__', kind)}")


def _read_union(kinds: tuple[object, ...], value: object, name: str) -> object:
    reasons = []
    for kind in kinds:
        try:
            return _read(kind, value, name)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _read_dataclass(kind: type, value: dict[str, object], name: str) -> object:
    arguments = {}
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in value:
            arguments[field.name] = _read(hints[field.name], value[field.name], f"{name}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if types.NoneType not in get_args(hints[field.name]):
                raise ValueError(f"{name} has no '{field.name}'")
            arguments[field.name] = None  # as object_of writes it
    return kind(**arguments)


@cache
def _hints(kind: type) -> dict[str, object]:
    """Field -> type."""
    return get_type_hints(kind)
