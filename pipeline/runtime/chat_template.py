"""Chat templates as transformers renders them, with jinja2 alone and in a process of their own."""

from __future__ import annotations

from pathlib import Path

from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, check_size
from edgepress.pipeline.model_files import read_tokenizer_config
from edgepress.pipeline.runtime.template_process import TemplateError, TemplateProcess

Message = dict[str, str]  # "role" (system, user, assistant) and "content"
FILE = "chat_template.jinja"
LARGEST = 1 << 20  # characters of a template; the longest that are in use have a tenth of that


class ChatTemplate:
    """The template of a folder, and the special tokens that it may name."""

    def __init__(self, source: str, special: dict[str, str], name: str) -> None:
        """Raises InputError for a template that is not valid Jinja."""
        self._name, self._special = name, special
        if len(source) > LARGEST:
            raise InputError(f"the chat template in {name} is longer than {LARGEST:,} characters; shorten it or delete it")
        try:
            self._process = TemplateProcess(source)
        except TemplateError as error:
            raise InputError(f"the chat template in {name} cannot be read ({error}); correct it or delete it") from error

    def render(self, messages: list[Message], answer: bool = True) -> str:
        """The text of a conversation, special tokens included. answer: end it where the model's answer begins.

        Raises InputError when the template refuses the messages, and when it does not end.
        """
        try:
            given = {"messages": messages, "add_generation_prompt": answer, "tools": None, "documents": None}
            return self._process.render(given | self._special)
        except TemplateError as error:
            raise InputError(
                f"the chat template in {self._name} refuses this conversation ({error}); change the message, or run without --chat"
            ) from error


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint or artifact, None where it has none."""
    source, name = _text(folder)
    return ChatTemplate(str(source), special_tokens(read_tokenizer_config(folder)), name) if source else None


def has_template(folder: Path) -> bool:
    """Whether there is a chat template, which may be wrong."""
    try:
        return bool(_text(folder)[0])
    except InputError:
        return (folder / FILE).is_file()


def _text(folder: Path) -> tuple[object, str]:
    """The template's source, and the file that holds it."""
    if (folder / FILE).is_file():
        check_size(folder / FILE, 4 * LARGEST)
        try:
            return (folder / FILE).read_text(encoding="utf-8"), FILE
        except UnicodeDecodeError as error:
            raise InputError(f"{folder / FILE} is not UTF-8 text ({error.reason}); save it as UTF-8 or delete it") from error
    source = read_tokenizer_config(folder).get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((row.get("template") for row in source if isinstance(row, dict) and row.get("name") == "default"), None)
    return source, "tokenizer_config.json"


def special_tokens(settings: JsonObject) -> dict[str, str]:
    """bos_token, eos_token and the like of a tokenizer_config."""
    named = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
