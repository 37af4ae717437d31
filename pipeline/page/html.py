"""The chat page with one of the engines that can answer in it."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

_HERE = Path(__file__).parent
_ENGINE, _TITLE = "/* the engine */", "<title>edgepress</title>"


def chat_page(engine: str, title: str = "edgepress") -> str:
    """The page as HTML. engine: a script of this folder, ``server.js`` or ``browser.js``, that defines ``engine``."""
    page = (_HERE / "chat.html").read_text(encoding="utf-8")
    whole = page.replace(_ENGINE, (_HERE / engine).read_text(encoding="utf-8").strip(), 1)
    return whole.replace(_TITLE, f"<title>{html.escape(title)}</title>", 1)


def script_hash(page: str) -> str:
    """The page's one script as a Content-Security-Policy names it, so that no other runs."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
