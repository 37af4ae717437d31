"""Damaged folders of other libraries: one line that names the matrix, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.pipeline.files import read_json
from safetensors.numpy import save_file
from third_party import GPTQ, arrays, copied


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def dropped(part: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(f"model.layers.1.mlp.up_proj.{part}")


def reshaped(part: str) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        tensors[name] = tensors[name][:-1].copy()

    return change


def turned(part: str) -> Callable[[dict[str, np.ndarray]], Any]:
    """An axis too many."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        tensors[name] = tensors[name][None].copy()

    return change


def of_floats(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.qzeros"] = tensors["model.layers.1.mlp.up_proj.qzeros"].astype(np.float32)


def uneven(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.g_idx"][0] = 1


BROKEN: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "zero points missing": (dropped("qzeros"), "lacks model.layers.1.mlp.up_proj.qzeros"),
    "scales missing": (dropped("scales"), "lacks model.layers.1.mlp.up_proj.scales"),
    "rows missing": (reshaped("qweight"), "cannot hold 64 codes"),
    "groups missing": (reshaped("scales"), "do not fit 2 groups"),
    "g_idx uneven": (uneven, "g_idx does not put"),
    "codes with an axis too many": (turned("qweight"), "which GPTQ does not store"),
    "g_idx with an axis too many": (turned("g_idx"), "which GPTQ does not store"),
    "zero points that are floats": (of_floats, "which GPTQ does not store"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(case: str, written: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """One line that names the matrix; nothing is written."""
    change, says = BROKEN[case]
    folder = copied(written / "optimum-symmetric", tmp_path / "copy", change)
    result = call("export", folder, tmp_path / "out")
    assert result.code == 2 and says in result.err.splitlines()[-1], result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def shorter(part: str) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        tensors[name] = tensors[name][:-1].copy()

    return change


def another_codebook(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight.quant_map"][3] += 1


BROKEN_BNB: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], Any], str]] = {
    "scales missing": (
        "nf4",
        shorter("weight.absmax"),
        "up_proj is damaged (scales float32 (95,) do not fit a matrix of 96 x 64)",
    ),
    "codes missing": (
        "nf4",
        shorter("weight"),
        "up_proj is damaged (codes uint8 (3071,) do not fit a matrix of 96 x 64)",
    ),
    "another codebook": ("nf4", another_codebook, "model.layers.1.mlp.up_proj has a custom codebook"),
    "rows missing": ("int8", shorter("SCB"), "model.layers.1.mlp.up_proj: (96, 64)"),
}


@pytest.mark.parametrize("case", BROKEN_BNB)
def test_broken_bitsandbytes_folder(
    case: str, bitsandbytes: tuple[Path, dict[str, dict[str, np.ndarray]]], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """As for GPTQ: one line that names the matrix; nothing is written."""
    name, change, says = BROKEN_BNB[case]
    shutil.copytree(bitsandbytes[0] / name, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = arrays(bitsandbytes[0] / name)
    change(tensors)
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    result = call("export", tmp_path / "copy", tmp_path / "out")
    assert result.code == 2 and says in result.err.splitlines()[-1], result.err
    assert "Traceback" not in result.err and sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("name", ["optimum-symmetric", "nf4"])
def test_quantized_folder_of_another_config(
    name: str, written: Path, bitsandbytes: tuple[Path, Any], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """Codes that fit one another and not the config beside them."""
    shutil.copytree((written if name in GPTQ else bitsandbytes[0]) / name, tmp_path / "copy")
    config = read_json(tmp_path / "copy" / "config.json") | {"intermediate_size": 128}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    result = call("export", tmp_path / "copy", tmp_path / "out")
    assert result.code == 2 and "do not fit its config.json" in result.err.splitlines()[-1], result.err
    assert "Traceback" not in result.err and sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_truncated_folder(written: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    folder = copied(written / "optimum-symmetric", tmp_path / "copy")
    cut(folder)
    result = call("export", folder, tmp_path / "out")
    assert result.code == 2 and "is cut short" in result.err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["quantize", "prune"])
@pytest.mark.parametrize("name", ["gptqmodel-act-order", "nf4"])
def test_not_quantized_twice(
    name: str, verb: str, written: Path, bitsandbytes: tuple[Path, Any], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """Only export reads them: one line that says so."""
    folder = (written if name in GPTQ else bitsandbytes[0]) / name
    result = call(verb, folder, tmp_path / "out", *(["--remove-count", "1"] if verb == "prune" else []))
    (line,) = result.err.splitlines()
    assert result.code == 2 and "already quantized" in line and "export it as it is" in line
