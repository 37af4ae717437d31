"""The folder with a page that runs an artifact in the browser. What a browser makes of it: tests/consumers."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from edgepress.pipeline import stages
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import InputError, MissingPackageError
from edgepress.pipeline.files import files_below, read_json, sha256
from edgepress.pipeline.options import WEB, BenchOptions, ExportOptions, PageOptions, QuantizeOptions
from edgepress.pipeline.page import libraries
from edgepress.pipeline.page.html import chat_page, script_hash


@pytest.fixture(scope="module")
def artifact(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("page")
    packed = stages.run("quantize", Artifact.load(tiny), folder / "packed", QuantizeOptions(method="rtn", bits=8, group_size=-1))
    return stages.run("export", packed, folder / "onnx", ExportOptions(target=WEB, text=text))


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A node_modules folder with files of the right names."""
    for package in libraries.PACKAGES:
        for name in package.files:
            (file := tmp_path / "node_modules" / package.name / name).parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
        (tmp_path / "node_modules" / package.name / "package.json").write_text(f'{{"version": "{package.version}"}}')
    return tmp_path / "node_modules"


def test_the_folder_has_all_that_it_names(artifact: Artifact, modules: Path, tmp_path: Path) -> None:
    page = stages.run("page", artifact, tmp_path / "page", PageOptions(modules=str(modules), title="Mine & <yours>"))
    there = {str(file.relative_to(page.path)) for file in files_below(page.path)}
    texts = {name: (page.path / name).read_text(encoding="utf-8") for name in ("index.html", "worker.js", "keep.js")}
    assert "<title>Mine &amp; &lt;yours&gt;</title>" in texts["index.html"]
    assert not re.search(r"https?://", "".join(texts.values()))  # nothing is fetched from elsewhere
    named = set(re.findall(r"lib/[\w.-]+\.(?:mjs|js|wasm)|(?<=\")(?:worker|keep)\.js", texts["index.html"] + texts["worker.js"]))
    assert named == {
        "lib/transformers.min.js",
        "lib/ort-wasm-simd-threaded.mjs",
        "lib/ort-wasm-simd-threaded.wasm",
        "worker.js",
        "keep.js",
    }
    config = read_json(page.path / "model" / "config.json")["transformers.js_config"]
    (data,) = config["use_external_data_format"]
    model = {"model/tokenizer.json", "model/tokenizer_config.json", f"model/onnx/{data}", f"model/onnx/{data}_data"}
    kept = json.loads("[" + texts["keep.js"].partition("...[")[2].partition("]")[0] + "]")
    assert {*kept, "keep.js", "manifest.json"} == {*there, "manifest.json"} and "CONTEXT = 256;" in texts["worker.js"]
    assert named | model | {"lib/LICENSE-transformers.js.txt", "lib/LICENSE-onnxruntime.txt"} <= there
    assert not any(name.endswith(("genai_config.json", "model.onnx")) for name in there)
    assert sha256(page.path / "model" / "onnx" / f"{data}_data") == sha256(artifact.path / "onnx" / f"{data}_data")


def test_no_other_script_may_run(artifact: Artifact, modules: Path, tmp_path: Path) -> None:
    text = (stages.run("page", artifact, tmp_path / "page", PageOptions(modules=str(modules))).path / "index.html").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
    assert policy and script_hash(text) in policy[1] and "default-src 'none'" in policy[1]
    assert text.index("Content-Security-Policy") < text.index("<script>") and text.count("<script>") == 1


def test_other_files_are_another_version(artifact: Artifact, modules: Path, tmp_path: Path) -> None:
    """Else a browser that was here before would keep what it has: of the model, of the page, and of what runs it."""
    pages = [
        stages.run("page", artifact, tmp_path / str(number), PageOptions(modules=str(modules), title=title)).path
        for number, title in enumerate(("a", "a", "b"))
    ]
    versions = [hashlib.sha256((page / "keep.js").read_bytes()).hexdigest() for page in pages]
    assert versions[0] == versions[1] != versions[2]
    (modules / "@huggingface" / "transformers" / "dist" / "transformers.min.js").write_text("mended")
    mended = stages.run("page", artifact, tmp_path / "mended", PageOptions(modules=str(modules), title="a")).path
    assert hashlib.sha256((mended / "keep.js").read_bytes()).hexdigest() not in versions
    assert "/* the version */" not in (pages[0] / "keep.js").read_text()


def test_what_is_no_artifact_for_browsers(tiny: Path, artifact: Artifact, text: Path, modules: Path, tmp_path: Path) -> None:
    other = stages.run("export", Artifact.load(tiny), tmp_path / "onnx", ExportOptions(text=text))
    with pytest.raises(InputError, match=r"was exported for cpu.*--target web"):
        stages.run("page", other, tmp_path / "page", PageOptions(modules=str(modules)))
    page = stages.run("page", artifact, tmp_path / "whole", PageOptions(modules=str(modules)))
    with pytest.raises(InputError, match="is a page; give the artifact that it was made from"):
        stages.run("bench", page, tmp_path / "page", BenchOptions())
    with pytest.raises(InputError, match="page takes an ONNX artifact"):
        stages.run("page", Artifact.load(tiny), tmp_path / "page", PageOptions(modules=str(modules)))
    assert not (tmp_path / "page").exists()


def test_libraries_that_are_not_there(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"transformers is not there or not whole; npm install @huggingface/transformers@"):
        stages.run("page", artifact, tmp_path / "page", PageOptions(modules=str(tmp_path)))
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"npm, which is not there; install Node\.js, or give --modules"):
        stages.run("page", artifact, tmp_path / "page", PageOptions())
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"cannot download @huggingface/transformers \(npm error code ENOTFOUND\); go online"):
        stages.run("page", artifact, tmp_path / "page", PageOptions())
    npm.write_text('#!/bin/sh\nfor last; do :; done\necho something else > "$last/package.tgz"\n')
    with pytest.raises(InputError, match=r"not the file it should be \(sha512\)"):
        stages.run("page", artifact, tmp_path / "page", PageOptions())
    assert not (tmp_path / "page").exists() and not list((tmp_path / "cache" / "web").iterdir())


def test_both_engines_fit_the_page() -> None:
    """What the page calls, each defines."""
    for engine in ("server.js", "browser.js"):
        page = chat_page(engine)
        assert "/* the engine */" not in page
        for part in ("const engine = {", "failed: ", "name() {", "async *answer("):
            assert page.count(part) >= 1, (engine, part)
