"""The page stage: an artifact for browsers, what runs it, and a page to chat with it, as a folder that any web server can send."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from edgepress.pipeline.artifact import Artifact, called
from edgepress.pipeline.errors import InputError
from edgepress.pipeline.files import JsonObject, expanded, files_below, folder_bytes, sha256
from edgepress.pipeline.model_files import read_genai_config
from edgepress.pipeline.options import WEB, PageOptions
from edgepress.pipeline.page.html import chat_page, script_hash
from edgepress.pipeline.page.libraries import PACKAGES, libraries

log = logging.getLogger("edgepress")
MODEL, LIBRARIES = "model", "lib"
_HERE = Path(__file__).parent
_OF_OTHERS = ("model.onnx", "genai_config.json", "manifest.json")  # which a browser does not read


def page(source: Artifact, out: Path, options: PageOptions) -> JsonObject:
    """Write the page into ``out``; returns the facts for the manifest.

    Raises InputError for an artifact that was not exported for browsers, and where the libraries cannot be had.
    """
    if (target := source.steps[-1].facts.get("target") if source.steps else None) != WEB:
        raise InputError(
            f"{source.path} was exported for {target or 'something else'}, not for browsers; export it with --target web"
        )
    files = libraries(None if options.modules is None else expanded(options.modules))
    (out / LIBRARIES).mkdir()
    for file in files:
        shutil.copyfile(file, out / LIBRARIES / file.name.replace("LICENSE", "LICENSE-transformers.js.txt"))
    shutil.copy(_HERE / "LICENSE-onnxruntime.txt", out / LIBRARIES)  # its package has none
    for name in source.files:
        if name not in _OF_OTHERS:
            (place := out / MODEL / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, place)  # no link: onnx refuses weights with more than one name
    title = options.title or called(source.path)
    text = chat_page("browser.js", title)
    policy = (
        f"default-src 'none'; script-src {script_hash(text)}; worker-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    charset = '<meta charset="utf-8">\n'
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    (out / "index.html").write_text(text.replace(charset, charset + meta), encoding="utf-8")
    context = str(read_genai_config(source.path).context_length)
    (out / "worker.js").write_text(_script("worker.js", "0 /* the context */", context), encoding="utf-8")
    written = {file.relative_to(out).as_posix(): sha256(file) for file in sorted(files_below(out))}
    kept = _script("keep.js", "[] /* the files */", json.dumps(list(written)))
    version = hashlib.sha256(repr((written, kept)).encode()).hexdigest()[:16]
    (out / "keep.js").write_text(kept.replace("/* the version */", version), encoding="utf-8")
    size = sum(file.stat().st_size for file in files_below(out))
    log.info("page: %.1f MB; to try it: python3 -m http.server -b 127.0.0.1 8421 in it, then http://localhost:8421", size / 1e6)
    return {"libraries": {package.name: package.version for package in PACKAGES}, "bytes": [folder_bytes(source.path), size]}


def _script(name: str, place: str, value: str) -> str:
    """A script of this folder with a value in its place."""
    return (_HERE / name).read_text(encoding="utf-8").replace(place, value, 1)
