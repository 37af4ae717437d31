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

from edgepress.pipeline.artifact import read_json, remove, sha256, write_json
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.importers.gptq import GptqFolder
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
    """The checkpoint that gptqmodel wrote for us, whose label is to be trusted."""
    config = read_json(folder / "quantize_config.json")
    found = GptqFolder(folder, sorted(folder.glob("*.safetensors")), config, format=config["checkpoint_format"])
    return {name: found[name] for name in found if name in shapes}


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
