"""Chat templates as transformers renders them, with jinja2 alone."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, read_json
from jinja2 import TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, str]  # "role" (system, user, assistant) and "content"
FILE = "chat_template.jinja"


class ChatTemplate:
    """The template of a folder, and the special tokens that it may name."""

    def __init__(self, source: str, special: dict[str, str], name: str) -> None:
        """Raises InputError for a template that is not valid Jinja."""
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._name, self._special = name, special
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template is a program of unknown origin
            raise InputError(f"the chat template in {name} cannot be read ({error}); correct it or fetch it again") from error

    def render(self, messages: list[Message], answer: bool = True) -> str:
        """The text of a conversation, special tokens included. answer: end it where the model's answer begins.

        Raises InputError when the template refuses the messages.
        """
        try:
            given = {"messages": messages, "add_generation_prompt": answer, "tools": None, "documents": None}
            text: str = self._template.render(given | self._special)
        except Exception as error:
            raise InputError(
                f"the chat template in {self._name} refuses this conversation ({error}); change the message, or run without --chat"
            ) from error
        return text


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint or artifact, None where it has none."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    source, name = settings.get("chat_template"), "tokenizer_config.json"
    if isinstance(source, list):  # several by name
        source = next((row.get("template") for row in source if isinstance(row, dict) and row.get("name") == "default"), None)
    if (folder / FILE).is_file():
        try:
            source, name = (folder / FILE).read_text(encoding="utf-8"), FILE
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / FILE} is not UTF-8 text ({error.reason}); fetch it again") from error
    if not source:
        return None
    return ChatTemplate(str(source), special_tokens(settings), name)


def special_tokens(settings: JsonObject) -> dict[str, str]:
    """bos_token, eos_token and the like of a tokenizer_config."""
    named = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson without Jinja's HTML escapes; other settings of json.dumps would call the template's code unsandboxed."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """``{% generation %}``, with which templates mark what to train on: rendered as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> Node:
        """The block's content in its own scope."""
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)
