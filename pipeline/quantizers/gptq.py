"""GPTQ (Frantar et al. 2022) through gptqmodel, in a process of its own.

gptqmodel changes environment variables, patches libraries and talks a great deal; a process of its own keeps that,
and its memory, away from the stages that follow. What it writes is read from its checkpoint.

    python -m edgepress.pipeline.quantizers.gptq JOB.json      (what ``quantize`` starts)
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.pipeline.artifact import read_json, remove, sha256, write_json
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.packed import PackedLinear
from edgepress.pipeline.progress import bar
from edgepress.pipeline.quantizers import Job
from edgepress.pipeline.table import require, version

log = logging.getLogger("edgepress")
# gptqmodel 7.6 can resume these, and only where every matrix has the same bits.
RESUMABLE = ("llama", "qwen3_moe")


def quantize(job: Job) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows. Raises ProofError with gptqmodel's reason when it fails.

    Interrupted, it leaves its checkpoint in ``job.scratch``, and the same job goes on after the last finished layer.
    """
    require("gptqmodel")
    for name, shape in job.linears.items():
        if job.bits(name) == 3 and any(n % 32 for n in shape):
            raise OptionError(f"gptqmodel packs 3 bits only where 32 divides both sides, and not {name}; use --bits 4 or 2")
    folder, options = job.scratch, job.options
    order = {
        "model": str(job.folder.resolve()),
        "weights": {p.name: sha256(p) for p in sorted(job.folder.glob("*.safetensors"))},
        "gptqmodel": version("gptqmodel"),
        "bits": options.weight_bits,
        "group_size": options.group,
        "sym": options.symmetric,
        "desc_act": options.act_order,
        "exceptions": job.exceptions,
        "left_out": sorted(job.left_out),
        "resumable": _resumable(job),
        "trust_remote_code": options.trust_remote_code,
        "windows": [row.tolist() for row in job.windows()],
    }
    if not ((folder / "job.json").is_file() and read_json(folder / "job.json") == order):
        remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / "job.json", order)
    elif (folder / "checkpoint" / "CURRENT").is_file():
        log.info("quantize: GPTQ goes on after the last layer finished before the interruption")
    try:
        _run(folder, len(job.linears))
        found = read_checkpoint(folder / "model", job.linears)
    except BaseException:
        if (folder / "checkpoint" / "CURRENT").is_file():
            log.info("quantize: GPTQ of the layers done so far is kept in %s; the same command goes on there", folder)
        else:
            remove(folder)
            log.info("quantize: GPTQ of the layers done so far is lost%s", "" if order["resumable"] else _why_not(job))
        raise
    remove(folder)
    return found


def _resumable(job: Job) -> bool:
    return read_json(job.folder / "config.json").get("model_type") in RESUMABLE and not job.exceptions and not job.left_out


def _why_not(job: Job) -> str:
    family = read_json(job.folder / "config.json").get("model_type")
    return f" (gptqmodel resumes {' and '.join(RESUMABLE)} alone)" if family not in RESUMABLE else " (--bits-for cannot be resumed)"


def _run(folder: Path, matrices: int) -> None:
    command = [sys.executable, "-m", __name__, str(folder / "job.json")]
    # Without a worker count that fits the machine gptqmodel refuses to start on few cores.
    # It also leaves a folder of logs where it runs.
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2)), PARENT: str(os.getpid())}
    written_log = folder / "log"
    with (
        written_log.open("wb") as written,
        subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment, cwd=folder) as child,
    ):
        try:
            _follow(child, written_log, matrices)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        lines = [line for line in written_log.read_text(errors="replace").splitlines() if line.strip()]
        raise ProofError(f"gptqmodel failed with exit code {child.returncode}: {lines[-1] if lines else 'no output'}")


def _follow(child: subprocess.Popen[bytes], log: Path, matrices: int) -> None:
    """Show progress until the process ends: gptqmodel reports a line for every matrix that it has quantized."""
    with log.open("rb") as file, bar("gptq", matrices, "matrix") as shown:
        while child.poll() is None:
            said = file.read()
            if layers := re.findall(rb"Quantizing layer (\d+) of (\d+)", said):
                shown.set_description(f"  gptq, layer {int(layers[-1][0])} of {int(layers[-1][1])}", refresh=False)
            shown.update(said.count(b"'process': 'gptq'"))
            time.sleep(0.2)


def read_checkpoint(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, PackedLinear]:
    """The checkpoint that gptqmodel wrote for us. Raises ProofError for a layout that it is not known to write."""
    from safetensors import safe_open

    config = read_json(folder / "quantize_config.json")
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            names = {key.removesuffix(".qweight") for key in file.keys() if key.endswith(".qweight")}  # noqa: SIM118
            for name in sorted(names & set(shapes)):
                tensors = {part: file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
                bits = width(tensors["qweight"].shape[0], shapes[name][1])
                found[name] = convert(name, shapes[name], tensors, bits, int(config["group_size"]), config["checkpoint_format"])
    return found


def width(words: int, columns: int) -> int:
    """Bits of a code, from the int32 words that hold ``columns`` of them (and what they were padded to).

    Read from the file because a folder's one "bits" is not that of every matrix. Raises ProofError when no width fits.
    """
    padded = -(-columns // 32)
    for bits in (2, 3, 4, 8):
        if words in (padded * bits, -(-columns * bits // 32)):
            return bits
    raise ProofError(f"{words} words cannot hold {columns} codes of 2, 3, 4 or 8 bits")


def convert(
    name: str, shape: tuple[int, int], tensors: dict[str, np.ndarray], bits: int, group_size: int, format: str
) -> PackedLinear:
    """GPTQ tensors to PackedLinear, code for code.

    qweight int32 (in * bits / 32, out) holds codes along ``in``, lower index in the lower bits; its rows may be padded.
    qzeros int32 (groups, out * bits / 32) holds zero points along ``out``. Format "gptq" (v1) stores zero - 1,
    "gptq_v2" the zero itself. scales float16 (groups, out). g_idx int32 (in,): the group of each row; where they are not
    in order (act-order) the rows are sorted by group, stably, and ``permutation`` says where each came from.
    group_size -1: one group.
    """
    rows, columns = shape
    length = columns if group_size == -1 else group_size
    order = np.argsort(tensors["g_idx"], kind="stable")
    if not np.array_equal(tensors["g_idx"][order], np.arange(columns) // length):
        raise ProofError(f"{name}: its g_idx does not put {length} rows in every group, so its layout is not known")
    in_order = np.array_equal(order, np.arange(columns))
    if format not in ("gptq", "gptq_v2"):
        raise ProofError(f"{name}: checkpoint format '{format}' is not known")
    codes = unpack_int32(tensors["qweight"].T, bits)[:, :columns]
    zeros = unpack_zeros(tensors["qzeros"], bits, format)[:, :rows].T
    scales = tensors["scales"].astype(np.float32).T
    symmetric = bool((zeros == 1 << (bits - 1)).all())  # the operator's own zero point: none need be stored
    return PackedLinear.from_codes(
        name,
        codes if in_order else codes[:, order],
        scales,
        None if symmetric else np.ascontiguousarray(zeros),
        bits,
        group_size,
        None if in_order else order.astype(np.int32),
    )


def unpack_zeros(stored: np.ndarray, bits: int, format: str) -> np.ndarray:
    """Zero points uint8 (groups, out or a little more) from qzeros."""
    if format == "gptq_v2":
        return unpack_int32(stored, bits)
    if bits == 3:  # fields run across words here, and the writer took 1 from each by itself
        return (unpack_int32(stored, bits) + np.uint8(1)) & np.uint8(7)
    # v1 was written by taking 1 from every field of the whole word: a zero point of 0 borrowed from the field above
    # it, so the 1s must be given back to the whole word as well.
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return unpack_int32((stored.view(np.uint32) + ones).view(np.int32), bits)


def unpack_int32(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis of int32 words, lower bits first, as uint8. 3-bit codes run across the words."""
    words = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape[:-1], -1)  # little endian: low byte first
    if bits == 8:
        return words
    stream = np.unpackbits(words, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


PARENT = "EDGEPRESS_PARENT"


def _end_with_parent() -> None:
    """End this process soon after its parent: one that was killed outright cannot end it itself, and GPTQ runs for hours."""
    parent = int(os.environ.get(PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def main(file: str) -> None:
    """The process of its own: quantize and save beside the job file."""
    _end_with_parent()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.looper.checkpoint_store import CheckpointConfig

    folder, job = Path(file).parent, json.loads(Path(file).read_text())
    exceptions = {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in job["exceptions"].items()}
    exceptions |= {f"-:^{re.escape(name)}$": {} for name in job["left_out"]}
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        desc_act=job["desc_act"],
        act_group_aware=False,
        dynamic=exceptions or None,
        pack_impl="original",  # the others compile an extension on first use: half a minute, and a compiler needed
        offload_to_disk_path=str(folder / "offload"),
    )
    settings: dict[str, Any] = {"device": "cpu", "trust_remote_code": job["trust_remote_code"]}
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, **settings)  # it would take bfloat16 by itself
    # gptqmodel wants plain dicts of lists
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["windows"]]
    checkpoint = CheckpointConfig(path=str(folder / "checkpoint")) if job["resumable"] else None
    model.quantize(rows, batch_size=4, checkpoint=checkpoint)
    model.save(str(folder / "model"))


if __name__ == "__main__":
    main(sys.argv[1])
