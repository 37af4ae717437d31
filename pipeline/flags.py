"""From a dataclass field to a flag, a recipe key, its check and its help."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.registry import look_up, suggestion

Some = TypeVar("Some", bound="Options")
# Former spelling -> the present one.
RENAMED = {"layers": "remove_layers", "heal": "healer", "method": "healer", "beside": "compare_with"}


@dataclass(frozen=True)
class Options:
    """Base of every option class: frozen dataclasses, one field an option."""

    def resolved(self) -> Self:
        """The same with every default that depends on another option filled in."""
        return self


def option(default: Any, help: str, choices: Mapping[str, str] | tuple[int, ...] | None = None, at_least: int | None = None) -> Any:
    """A dataclass field that is also a flag and a recipe key."""
    metadata = {"help": help, "choices": choices, "at_least": at_least, "optional": default is None}
    return field(default=default, metadata=metadata)


def _hints(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field name -> (its type without Optional, whether it is a tuple)."""
    hints = {}
    for name, hint in typing.get_type_hints(cls).items():
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is tuple:
            hints[name] = (arguments[0], True)
        elif typing.get_origin(hint) is types.UnionType:
            hints[name] = (next(a for a in arguments if a is not type(None)), False)
        else:
            hints[name] = (hint, False)
    return hints


def flag(name: str) -> str:
    """``--group-size`` for ``group_size``."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *classes: type[Options]) -> None:
    """Add a flag for every field of the option classes, each name once; flags not given leave no attribute."""
    seen: set[str] = set()
    every = [item for cls in classes for item in dataclasses.fields(cls)]
    for cls in classes:
        hints = _hints(cls)
        group = parser.add_argument_group((cls.__doc__ or "").partition("\n")[0].rstrip("."))
        for item in dataclasses.fields(cls):
            if item.name in seen:
                continue
            seen.add(item.name)
            kind, many = hints[item.name]
            text = item.metadata["help"]
            choices = item.metadata["choices"]
            if isinstance(choices, Mapping):  # a stage may know more of them than the one that names the flag first
                choices = {k: v for other in every if other.name == item.name for k, v in other.metadata["choices"].items()}
                text += ": " + "; ".join(f"{key} ({value})" for key, value in choices.items())
            elif choices:
                text += ": " + ", ".join(map(str, choices))
            if item.default not in (None, ()) and kind is not Path:
                shown = ",".join(str(part) for part in typing.cast("tuple[Any, ...]", item.default)) if many else item.default
                text += f" (default: {shown})"
            settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
            if kind is bool:
                settings["action"] = argparse.BooleanOptionalAction
            else:
                settings["metavar"] = {int: "N", float: "F", Path: "PATH", str: "NAME"}[kind] + (",..." if many else "")
            if many and kind is str:  # commas mean something in a regular expression
                settings |= {"action": "append", "metavar": "RULE"}
            group.add_argument(flag(item.name), dest=item.name, **settings)


def make(cls: type[Some], values: Mapping[str, Any], where: str = "option") -> Some:
    """An options object from flags or recipe keys, every value converted and checked.

    Raises OptionError that names the flag, the value and what is allowed.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    hints = _hints(cls)
    checked = {}
    for raw_name, value in values.items():
        name = str(raw_name).replace("-", "_")
        if name not in fields and RENAMED.get(name) in fields:
            raise OptionError(f"{flag(name)} is now {flag(RENAMED[name])}")
        if name not in fields:
            raise OptionError(f"unknown {where} '{raw_name}'{suggestion(name, fields)}; there are: {', '.join(fields)}")
        kind, many = hints[name]
        if many:
            items = value if isinstance(value, list | tuple) else [value] if kind is str else str(value).split(",")
            checked[name] = tuple(_value(name, kind, item, fields[name].metadata, many) for item in items)
        else:
            checked[name] = _value(name, kind, value, fields[name].metadata)
    return cls(**checked)


def _value(name: str, kind: Any, value: Any, metadata: Mapping[str, Any], many: bool = False) -> Any:
    if value is None:
        if metadata["optional"]:
            return None
        raise OptionError(f"{flag(name)} needs a value; leave the line out to have the default")
    if kind is bool:
        if not isinstance(value, bool):
            raise OptionError(f"{flag(name)} is true or false, not {value!r}")
        return value
    try:
        if isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
            raise ValueError
        converted = kind(value)
        if converted != converted:  # NaN
            raise ValueError
    except (ValueError, TypeError) as error:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "a text") + (
            " (or several, separated by commas)" if many else ""
        )
        raise OptionError(f"{flag(name)} takes {wanted}, not {value!r}") from error
    choices, at_least = metadata["choices"], metadata["at_least"]
    if isinstance(choices, Mapping):
        look_up(choices, converted, name.replace("_", " "))
    elif choices and converted not in choices:
        raise OptionError(f"{flag(name)} is one of {', '.join(map(str, choices))}, not {value}")
    if at_least is not None and converted < at_least:
        raise OptionError(f"{flag(name)} must be at least {at_least}, not {value}")
    return converted
