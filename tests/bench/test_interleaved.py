"""Several artifacts in one benchmark: compared by round, one damaged, one killed."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.pipeline.files import read_json, sha256

SHORT = ["--repeats", "2", "--prompt-lengths", "8", "--new-tokens", "4", "--text-tokens", "256", "--no-original-speed"]
Call = Callable[..., Any]


def copy_artifact(source: Path, target: Path, changes: Callable[[Path], None] = lambda folder: None) -> Path:
    """A copy that its manifest calls whole, whatever was changed in it."""
    shutil.copytree(source, target)
    changes(target)
    manifest = read_json(target / "manifest.json")
    for name, known in manifest["files"].items():
        known["sha256"] = sha256(target / name)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.fixture(scope="module")
def compared(build: Path, tiny: Path, text: Path, edgepress: Call, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The artifact, a damaged copy, and one that is killed while it is measured; in one benchmark."""
    folder = tmp_path_factory.mktemp("compared")

    def one_scale(copy: Path) -> None:
        """The scale of one group of one matrix, found by its value, is halved."""
        from edgepress.pipeline.checkpoint.packed import PackedFile

        packed = PackedFile(build / "03-quantize")
        scales = packed["model.layers.1.mlp.down_proj"].scales
        data = bytearray((copy / "model.onnx.data").read_bytes())
        offset = data.find(scales.astype("<f2").tobytes())
        assert offset >= 0
        value = np.frombuffer(bytes(data[offset : offset + 2]), "<f2")[0]
        data[offset : offset + 2] = np.float16(value / 2).tobytes()
        (copy / "model.onnx.data").write_bytes(data)

    # beside their checkpoints, as in a build, so that their stages are found
    shutil.copytree(build, folder / "damaged")
    shutil.rmtree(folder / "damaged" / "04-export")
    damaged = copy_artifact(build / "04-export", folder / "damaged" / "04-export", one_scale)
    killed = copy_artifact(build / "04-export", folder / "killed", lambda copy: (copy / "killed").write_text("x"))
    out = folder / "report"
    arguments = ["bench", build, damaged, killed, "--reference", tiny, "--text", text, "--out", out, *SHORT]
    return edgepress(*arguments, env=killer(folder, "killed")), out


def killer(folder: Path, name: str) -> dict[str, str]:
    """Environment in which a measuring process that opens a file of the folder ``name`` kills itself, as if out of memory."""
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, signal, sys
            def watch(event, arguments):
                if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and "/{name}/" in str(arguments[0]):
                    os.kill(os.getpid(), signal.SIGKILL)
            if "edgepress.pipeline.bench.worker" in sys.orig_argv:
                sys.addaudithook(watch)
        """)
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_crash_is_reported_among_the_others(compared: tuple[Any, Path]) -> None:
    result, out = compared
    assert result.code == 0, result.err
    killed = read_json(out / "report.json")["compared_with"][1]
    assert "out of memory" in killed["failed"]["speed"] and "out of memory" in killed["failed"]["quality"]
    assert not [name for name in killed["figures"] if name.startswith(("speed", "memory", "quality"))]
    assert killed["stages"][-1]["failed"]
    assert "killed could not be measured (speed)" in (out / "report.md").read_text().splitlines()[4]
    assert "Traceback" not in result.err


def test_others_are_compared_round_by_round(compared: tuple[Any, Path]) -> None:
    content = read_json(compared[1] / "report.json")
    assert {c["artifact"] for c in content["comparisons"]} == {"damaged"}
    for comparison in content["comparisons"]:
        assert comparison["rounds"] == 2 and comparison["low"] <= comparison["ratio"] <= comparison["high"]
        assert comparison["verdict"] in ("faster", "slower", "larger", "smaller", "no difference shown")
    assert len({r["run"] for r in [content, *content["compared_with"]]}) == 1


def test_damaged_artifact_is_flagged_by_its_stage(compared: tuple[Any, Path]) -> None:
    """One scale of one group: perplexity hardly moves, and still the export is named, not the quantizer."""
    content = read_json(compared[1] / "report.json")
    whole, damaged = content["stages"], content["compared_with"][0]["stages"]
    assert [row["name"] for row in whole] == ["original", "pruned", "quantized", "onnx_level_0", "onnx"]
    assert not [row["name"] for row in whole if row["name"] == "onnx_level_0" and "suspect" in row]
    assert [row["name"] for row in damaged if "suspect" in row and "damaged" in row["suspect"]] == ["onnx_level_0"]
    assert "is suspect" in (compared[1] / "report.md").read_text()


def test_level_0_is_the_packed_checkpoint(compared: tuple[Any, Path]) -> None:
    """What the export must not lose, and each stage's change adds up to the whole."""
    rows = {row["name"]: row for row in read_json(compared[1] / "report.json")["stages"]}
    assert rows["onnx_level_0"]["perplexity"] == pytest.approx(rows["quantized"]["perplexity"], rel=1e-5)
    whole = np.log(rows["onnx"]["perplexity"] / rows["original"]["perplexity"])
    assert sum(row.get("change_nats", 0) for row in rows.values()) == pytest.approx(whole, abs=1e-5)
    assert rows["original"]["kl_mean"] == 0 and rows["original"]["top1_agreement"] == 1


def test_page_is_written_and_gathered(compared: tuple[Any, Path], call: Call, tmp_path: Path) -> None:
    page = (compared[1] / "report.html").read_text()
    assert "<svg" in page and "could not be measured" in page
    assert call("report", compared[1], "--out", tmp_path / "all.html").code == 0
    assert (tmp_path / "all.html").read_text().count("<h3>") == page.count("<h3>")


def test_alone_a_crash_is_one_line(build: Path, text: Path, edgepress: Call, tmp_path: Path) -> None:
    artifact = copy_artifact(build / "04-export", tmp_path / "killed", lambda copy: (copy / "killed").write_text("x"))
    result = edgepress("bench", artifact, "--text", text, "--out", tmp_path / "out", *SHORT, env=killer(tmp_path, "killed"))
    assert result.code == 2 and not (tmp_path / "out").exists()
    assert "out of memory" in result.err.splitlines()[-1] and "Traceback" not in result.err
