"""Chat templates of strangers: whatever they do, they end, and in one line."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.runtime import template_process
from edgepress.pipeline.runtime.chat_template import ChatTemplate
from refusal import no_longer_than

MESSAGES = [{"role": "user", "content": "x"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
HOSTILE = {
    "doubling": DOUBLED,
    "long text": "{{ 'a' * 10 ** 10 }}",
    "padding": "{{ 'a'.center(10 ** 12) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "replacement": "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
    "output": "{{ 'a' * (17 * 2 ** 20) }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "size": "x" * (1 << 20) + "y",
    "objects": "{{ cycler.__init__.__globals__ }}",
    "file": "{% include '/etc/passwd' %}",
}
ENDLESS = {"loop": (LOOP, 0.2), "power": ("{{ (10 ** 8) ** (10 ** 8) }}", 0.2)}


@pytest.mark.parametrize("case", HOSTILE)
def test_bounds(case: str) -> None:
    with no_longer_than(20), pytest.raises(InputError, match="chat template in t") as refusal:
        ChatTemplate(HOSTILE[case], {}, "t").render(MESSAGES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("case", ENDLESS)
def test_time(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Python or one instruction of it loops: the system ends the process, here after a shorter time."""
    source, seconds = ENDLESS[case]
    child = tmp_path / "child.py"
    child.write_text(template_process.CHILD.read_text().replace("CPU_SECONDS = 4.0", f"CPU_SECONDS = {seconds}"))
    monkeypatch.setattr(template_process, "CHILD", child)
    with no_longer_than(20), pytest.raises(InputError, match="does not end"):
        ChatTemplate(source, {}, "t").render(MESSAGES)


def test_the_clock_where_the_system_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    with no_longer_than(20), pytest.raises(InputError, match="does not end"):
        ChatTemplate(LOOP, {}, "t").render(MESSAGES)


def test_a_template_that_failed_can_be_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message too many for it is not the end of the conversation."""
    template = ChatTemplate("{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}{{ messages[0].content }}", {}, "t")
    monkeypatch.setattr(template_process, "SECONDS", 0.2)
    with pytest.raises(InputError):
        template.render([{"role": "user", "content": "bad"}])
    monkeypatch.undo()
    assert template.render(MESSAGES) == "x"
    assert template.render([{"role": "user", "content": "half of a pair: \ud800, Zoë"}]) == "half of a pair: \ud800, Zoë"


def test_ctrl_c_does_not_shift_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a request that was interrupted is not taken for the next one's."""
    template = ChatTemplate("{{ messages[0].content }}", {}, "t")

    process = template._process._ready()
    monkeypatch.setattr(process, "stdout", _Interrupting(process.stdout))
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "first"}])
    assert template.render(MESSAGES) == "x"


class _Interrupting:
    def __init__(self, stream: Any) -> None:
        self.close = stream.close

    def readline(self) -> bytes:
        raise KeyboardInterrupt


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("x", {}, "t")
    process = template._process._ready()
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


def test_what_the_process_may_do() -> None:
    """Were there a way out of the sandbox, it would not lead to a file or a program."""
    code = "\n".join(
        (
            "import sys, runpy",
            f"child = runpy.run_path({str(template_process.CHILD)!r})",
            "child['_confine']()",
            "import os, subprocess",
            "for act in (lambda: open('/etc/passwd'), lambda: subprocess.run(['true']), lambda: bytearray(2 << 30)):",
            "    try: act(); print('could')",
            "    except (OSError, MemoryError): pass",
            "print(os.system('echo could > /dev/null') == 0)",
        )
    )
    done = subprocess.run([sys.executable, "-c", "import subprocess\n" + code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_filters_that_load_something_first() -> None:
    """Nothing can be loaded once the process is confined, so all that Jinja loads on use is there before."""
    source = "{{ 'a b'|wordwrap(1) }}{{ [1]|pprint }}{{ 'http://a.b'|urlize }}{{ lipsum(1)|length > 9 }}"
    source += "{{ strftime_now('%Y') }}{{ 'a'|tojson(indent=1) }}"
    assert ChatTemplate(source, {}, "t").render(MESSAGES).endswith(f'True{time.strftime("%Y")}"a"')
