"""Renders a chat template in a process of its own, which template_process.py starts: ``python template_child.py``.

A template is a program of unknown origin. Jinja's sandbox keeps it from the objects around it, and bounds neither time nor
memory; here the system does. Requests and answers are JSON objects, a line each. Nothing of edgepress is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 4.0  # for one request; a template takes milliseconds
MEMORY = 512 << 20  # bytes that all requests together may add
LONGEST = 16 << 20  # characters of a rendered text; a context of a million tokens takes a quarter of that


# Loads what compiling and rendering load on use.
_EVERYTHING = (
    "{% for a in 'b'|list if a %}{{ loop.index }}{{ a|tojson }}{% generation %}{{ a|upper|e }}{% endgeneration %}{% endfor %}"
)


def compiled(source: str) -> Template:
    """A template with what transformers offers to it."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def main() -> None:
    """Answer requests until the input ends: {"source": text} compiles, {"values": object} renders what was compiled last."""
    _confine()
    template = None
    for line in sys.stdin.buffer:
        _limit_time(CPU_SECONDS)
        try:
            request = json.loads(line)
            if "source" in request:
                template, text = compiled(request["source"]), ""
            else:
                assert template is not None
                text = template.render(request["values"])
            too_long = {"error": f"it renders more than {LONGEST >> 20} million characters"}
            encoded = json.dumps({"text": text} if len(text) <= LONGEST else too_long)
        except MemoryError:
            encoded = json.dumps({"error": f"it takes more than {MEMORY >> 20} MB of memory"})
        except Exception as error:
            encoded = json.dumps({"error": str(error)[:1000] or type(error).__name__})
        _limit_time(0)
        sys.stdout.write(encoded + "\n")
        sys.stdout.flush()


def _confine() -> None:
    """From here on this process takes no more than its share of memory, and opens no file and starts no program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent decides
    for module in ("jinja2.constants", "jinja2.debug", "encodings.unicode_escape", "pprint", "textwrap", "unicodedata"):
        importlib.import_module(module)  # loaded on use, which will be too late
    compiled(_EVERYTHING).render()
    datetime.now().astimezone()  # reads the file of the time zone
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none of these, macOS not all
        import resource

        share = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (share, share))


def _address_space() -> int:
    """Bytes of it in use; a guess that is high enough where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 30


def _limit_time(seconds: float) -> None:
    """The system ends this process after so much time on a processor from now, whatever it is doing; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


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


if __name__ == "__main__":
    main()
