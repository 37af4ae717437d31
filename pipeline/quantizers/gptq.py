"""GPTQ (Frantar et al. 2022) through gptqmodel, in a process of its own.

gptqmodel changes environment variables, patches libraries and talks a great deal; a process of its own keeps that,
and its memory, away from the stages that follow. What it writes is read from its checkpoint.

    python -m edgepress.pipeline.quantizers.gptq JOB.json      (what ``quantize`` starts)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.artifact import read_json, write_json
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.packed import PackedLinear
from edgepress.pipeline.progress import bar
from edgepress.pipeline.quantizers import Job
from edgepress.pipeline.table import require


def quantize(job: Job) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows. Raises ProofError with gptqmodel's reason when it fails."""
    require("gptqmodel")
    odd = [name for name, shape in job.linears.items() if job.options.bits == 3 and any(n % 32 for n in shape)]
    if odd:
        raise OptionError(f"gptqmodel packs 3 bits only where 32 divides both sides, and not {odd[0]}; use --bits 4 or 2")
    with tempfile.TemporaryDirectory(prefix="edgepress-gptq-") as scratch:
        folder = Path(scratch)
        np.savez(folder / "windows.npz", *job.windows())
        options = job.options
        write_json(
            folder / "job.json",
            {
                "model": str(job.folder.resolve()),
                "bits": options.bits,
                "group_size": options.group_size,
                "sym": options.symmetric,
                "trust_remote_code": options.trust_remote_code,
            },
        )
        _run(folder, len(job.linears))
        return read_checkpoint(folder / "model", job.linears)


def _run(folder: Path, matrices: int) -> None:
    command = [sys.executable, "-m", __name__, str(folder / "job.json")]
    # Without a worker count that fits the machine gptqmodel refuses to start on few cores.
    # It also leaves a folder of logs where it runs.
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2))}
    log = folder / "log"
    with (
        log.open("wb") as written,
        subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment, cwd=folder) as child,
    ):
        try:
            _follow(child, log, matrices)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ProofError(f"gptqmodel failed with exit code {child.returncode}: {lines[-1] if lines else 'no output'}")


def _follow(child: subprocess.Popen[bytes], log: Path, matrices: int) -> None:
    """Show progress until the process ends: gptqmodel reports a line for every matrix that it has quantized."""
    with log.open("rb") as file, bar("gptq", matrices, "matrix") as shown:
        while child.poll() is None:
            shown.update(file.read().count(b"'process': 'gptq'"))
            time.sleep(0.2)


def read_checkpoint(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, PackedLinear]:
    """A GPTQ checkpoint that gptqmodel wrote, without act-order. Raises ProofError for rows in another order."""
    from safetensors import safe_open

    config = read_json(folder / "quantize_config.json")
    bits, group_size = int(config["bits"]), int(config["group_size"])
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            names = {key.removesuffix(".qweight") for key in file.keys() if key.endswith(".qweight")}  # noqa: SIM118
            for name in sorted(names & set(shapes)):
                tensors = {part: file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
                found[name] = convert(name, shapes[name], tensors, bits, group_size, config["checkpoint_format"])
    return found


def convert(
    name: str, shape: tuple[int, int], tensors: dict[str, np.ndarray], bits: int, group_size: int, format: str
) -> PackedLinear:
    """GPTQ tensors to PackedLinear, code for code.

    qweight int32 (in * bits / 32, out) holds codes along ``in``, lower index in the lower bits; its rows may be padded.
    qzeros int32 (groups, out * bits / 32) holds zero points along ``out``. Format "gptq" (v1) stores zero - 1,
    "gptq_v2" the zero itself. scales float16 (groups, out). g_idx int32 (in,): the group of each row.
    """
    rows, columns = shape
    if not np.array_equal(tensors["g_idx"], np.arange(columns) // group_size):
        raise ProofError(f"{name} has its rows in another order (act-order), which is not supported yet")
    if format not in ("gptq", "gptq_v2"):
        raise ProofError(f"{name}: checkpoint format '{format}' is not known")
    codes = unpack_int32(tensors["qweight"].T, bits)[:, :columns]
    stored = tensors["qzeros"]
    if format == "gptq" and bits != 3:
        # v1 was written by taking 1 from every field of the whole word: a zero point of 0 borrowed from the field above
        # it, so the 1s must be given back to the whole word as well.
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        stored = (stored.view(np.uint32) + ones).view(np.int32)
    zeros = unpack_int32(stored, bits)[:, :rows].T
    if format == "gptq" and bits == 3:  # fields run across words here, and the writer took 1 from each by itself
        zeros = (zeros + np.uint8(1)) & np.uint8(7)
    scales = tensors["scales"].astype(np.float32).T
    symmetric = bool((zeros == 1 << (bits - 1)).all())  # the operator's own zero point: none need be stored
    return PackedLinear.from_codes(name, codes, scales, None if symmetric else np.ascontiguousarray(zeros), bits, group_size)


def unpack_int32(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis of int32 words, lower bits first, as uint8. 3-bit codes run across the words."""
    words = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape[:-1], -1)  # little endian: low byte first
    if bits == 8:
        return words
    stream = np.unpackbits(words, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def main(file: str) -> None:
    """The process of its own: quantize and save beside the job file."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    folder, job = Path(file).parent, json.loads(Path(file).read_text())
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        desc_act=False,
        act_group_aware=False,
        pack_impl="original",  # the others compile an extension on first use: half a minute, and a compiler needed
        offload_to_disk_path=str(folder / "offload"),
    )
    settings: dict[str, Any] = {"device": "cpu", "trust_remote_code": job["trust_remote_code"]}
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, **settings)  # it would take bfloat16 by itself
    with np.load(folder / "windows.npz") as arrays:
        rows = [arrays[name].tolist() for name in arrays.files]
    # gptqmodel wants plain dicts of lists
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(folder / "model"))


if __name__ == "__main__":
    main(sys.argv[1])
