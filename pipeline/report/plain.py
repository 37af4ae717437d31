"""Dataclasses to plain JSON data; documents.typed is the way back, checked against their annotations."""

from __future__ import annotations

import dataclasses


def to_plain(value: object) -> object:
    """Dataclasses become objects without the fields that are None by default, tuples become lists; the rest stays as it is."""
    if dataclasses.is_dataclass(value):
        return object_of(value)
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def object_of(value: object) -> dict[str, object]:
    """The JSON object of a dataclass, in the order of its fields; one that is None, as by default, is absent."""
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is not a dataclass")
    fields = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
    return {name: to_plain(item) for name, (item, default) in fields.items() if item is not None or default is not None}
