"""From a dataclass field to a flag, a recipe key, its check and its help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar, cast

from edgepress.pipeline.documents import shown
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import expanded
from edgepress.pipeline.registry import look_up, suggestion

Chosen = TypeVar("Chosen", bound="Options")
Value = TypeVar("Value")
# Former spelling -> the present one.
RENAMED = {
    "layers": "remove_layers",
    "heal": "healer",
    "method": "healer",
    "beside": "compare_with",
    "min_agreement": "max_added_kl",
}


_LARGEST = (1 << 53) - 1  # whole numbers up to here are the same to all that read JSON
_ABSENT = argparse.SUPPRESS  # a flag that is not given leaves no attribute


@dataclass(frozen=True)
class Options:
    """Base of every option class: frozen dataclasses, one field an option."""

    def resolved(self) -> Self:
        """The same with every default that depends on another option filled in."""
        return self


@dataclass(frozen=True)
class Setting:
    """What is known of an option beside its type and default: help, allowed values (with their help), least and greatest value.

    rules: of an option that takes several texts, whether a comma may be part of one, as in a regular expression. metavar: what
    stands for its value in the help, where the type does not say it.
    """

    help: str
    choices: Mapping[str, str] | tuple[int, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    rules: bool = False
    optional: bool = False
    metavar: str = ""


def option(
    default: Value,
    help: str,
    choices: Mapping[str, str] | tuple[int, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    rules: bool = False,
    metavar: str = "",
) -> Value:
    """A dataclass field that is also a flag and a recipe key; typed as its default, as dataclasses.field is."""
    setting = Setting(help, choices, at_least, at_most, rules, optional=default is None, metavar=metavar)
    return field(default=default, metadata={"setting": setting})


def setting_of(item: dataclasses.Field[object]) -> Setting:
    """The Setting of a field that ``option`` made."""
    setting: Setting = item.metadata["setting"]
    return setting


@dataclass(frozen=True)
class _Kind:
    """Type of an option's value, and whether it takes several, separated by commas."""

    type: type
    many: bool


def _kinds(cls: type[Options]) -> dict[str, _Kind]:
    kinds = {}
    for name, hint in typing.get_type_hints(cls).items():
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is tuple:
            kinds[name] = _Kind(arguments[0], many=True)
        elif typing.get_origin(hint) is types.UnionType:
            kinds[name] = _Kind(next(a for a in arguments if a is not type(None)), many=False)
        else:
            kinds[name] = _Kind(hint, many=False)
    return kinds


def flag(name: str) -> str:
    """``--group-size`` for ``group_size``."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, *classes: type[Options]) -> None:
    """Add a flag for every field of the option classes, each name once; flags not given leave no attribute."""
    every = [item for cls in classes for item in dataclasses.fields(cls)]
    seen: set[str] = set()
    for cls in classes:
        kinds = _kinds(cls)
        group = parser.add_argument_group((cls.__doc__ or "").partition("\n")[0].rstrip("."))
        for item in dataclasses.fields(cls):
            if item.name not in seen:
                seen.add(item.name)
                _add_flag(group, item, kinds[item.name], [other for other in every if other.name == item.name])


def _add_flag(
    group: argparse._ArgumentGroup, item: dataclasses.Field[object], kind: _Kind, same: list[dataclasses.Field[object]]
) -> None:
    """One flag; ``same``: the fields of its name in all classes, for a stage may know more choices than the first that has it."""
    name, text = flag(item.name), _help(item, kind, same)
    if kind.type is bool:
        group.add_argument(name, dest=item.name, help=text, default=_ABSENT, action=argparse.BooleanOptionalAction)
    elif kind.many and kind.type is str:  # may be given once for each; rules must be
        metavar = setting_of(item).metavar or ("RULE" if setting_of(item).rules else "NAME,...")
        group.add_argument(name, dest=item.name, help=text, default=_ABSENT, action="append", metavar=metavar)
    else:
        metavar = {int: "N", float: "F", Path: "PATH", str: "NAME"}[kind.type] + (",..." if kind.many else "")
        metavar = setting_of(item).metavar or metavar
        group.add_argument(name, dest=item.name, help=text, default=_ABSENT, metavar=metavar)


def _help(item: dataclasses.Field[object], kind: _Kind, same: list[dataclasses.Field[object]]) -> str:
    text, choices = setting_of(item).help, setting_of(item).choices
    if isinstance(choices, Mapping):
        tables = [setting_of(other).choices for other in same]
        merged = {key: value for table in tables if isinstance(table, Mapping) for key, value in table.items()}
        text += ": " + "; ".join(f"{key} ({value})" for key, value in merged.items())
    elif choices:
        text += ": " + ", ".join(map(str, choices))
    if item.default not in (None, ()) and kind.type is not Path:
        default = ",".join(map(str, cast("tuple[object, ...]", item.default))) if kind.many else item.default
        text += f" (default: {default})"
    return text.replace("%", "%%")


def make(cls: type[Chosen], values: Mapping[str, object], where: str = "option") -> Chosen:
    """An options object from flags or recipe keys, every value converted and checked.

    Raises OptionError that names the flag, the value and what is allowed.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    kinds = _kinds(cls)
    checked: dict[str, object] = {}
    for raw_name, value in values.items():
        name = str(raw_name).replace("-", "_")
        if name not in fields and RENAMED.get(name) in fields:
            raise OptionError(f"{flag(name)} is now {flag(RENAMED[name])}")
        if name not in fields:
            raise OptionError(f"unknown {where} '{raw_name}'{suggestion(name, fields)}; there are: {', '.join(fields)}")
        if name == "remove_layers" and type(value) is int:  # a count, as it used to be: on the command line it is text
            raise OptionError(f"remove_layers takes indices, as [4, 5]; for a count give remove_count: {value}")
        kind, setting = kinds[name], setting_of(fields[name])
        if kind.many:
            checked[name] = tuple(_checked(name, kind, item, setting) for item in _items(value, kind, setting))
        else:
            checked[name] = _checked(name, kind, value, setting)
    return cls(**checked)


def _items(value: object, kind: _Kind, setting: Setting) -> Iterable[object]:
    """The values of an option that takes several: a list, as of a recipe, or a text in which commas separate them."""
    if not isinstance(value, list | tuple):
        return [value] if setting.rules else parts(str(value))
    if kind.type is str and not setting.rules:  # a flag that was given again
        return [part for item in value for part in (parts(item) if isinstance(item, str) else [item])]
    return value


def parts(text: str) -> list[str]:
    """What commas separate, without the spaces around it; a path that is there may have commas in its name.

    A text without a part is one, for whoever reads it to refuse.
    """
    if os.path.lexists(expanded(text)):
        return [text]
    return [part for item in text.split(",") if (part := item.strip())] or [text]


def _checked(name: str, kind: _Kind, value: object, setting: Setting) -> object:
    """One value, converted. Raises OptionError."""
    if value is None:
        if setting.optional:
            return None
        raise OptionError(f"{flag(name)} needs a value; omit it to use the default")
    if kind.type is bool:
        if not isinstance(value, bool):
            raise OptionError(f"{flag(name)} is true or false, not {shown(value)}")
        return value
    converted = _converted(name, kind, value)
    choices = setting.choices
    if isinstance(choices, Mapping):
        look_up(choices, str(converted), name.replace("_", " "))
    elif choices and converted not in choices:
        raise OptionError(f"{flag(name)} is one of {', '.join(map(str, choices))}, not {shown(value)}")
    if isinstance(converted, int | float):
        if setting.at_least is not None and converted < setting.at_least:
            raise OptionError(f"{flag(name)} must be at least {setting.at_least:,.15g}, not {shown(value)}")
        if setting.at_most is not None and converted > setting.at_most:
            raise OptionError(f"{flag(name)} must be at most {setting.at_most:,.15g}, not {shown(value)}")
    return converted


def _converted(name: str, kind: _Kind, value: object) -> object:
    try:
        if isinstance(value, bool | list | dict) or (kind.type is int and isinstance(value, float)):
            raise ValueError
        if isinstance(value, str) and "\0" in value:  # the system's calls would stop there
            raise ValueError
        converted: object = kind.type(value)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError
        if isinstance(converted, int) and abs(converted) > _LARGEST:
            raise OptionError(f"{flag(name)} must be at most {_LARGEST:,}, not {shown(value)}")
        if isinstance(converted, Path):
            return expanded(converted)
    except (ValueError, TypeError, OverflowError) as error:
        allowed = {int: "a whole number", float: "a number"}.get(kind.type, "a text")
        several = " (or several, separated by commas)" if kind.many else ""
        raise OptionError(f"{flag(name)} takes {allowed}{several}, not {shown(value)}") from error
    return converted
