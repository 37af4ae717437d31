"""GPTQ (Frantar et al. 2022) through gptqmodel.

gptqmodel patches libraries and prints a great deal: the stage runs in a process of its own (pipeline/apart.py). What
gptqmodel writes is read from its checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import re
import sys
from pathlib import Path
from typing import Any

from edgepress.pipeline.checkpoint.importers.gptq import GptqFolder
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json, remove, sha256, write_json
from edgepress.pipeline.quantize.isolated import tell
from edgepress.pipeline.quantize.job import QuantizeJob
from edgepress.pipeline.registry import version

log = logging.getLogger("edgepress")
# gptqmodel 7.6 can resume these, and only where every matrix has the same bits.
RESUMABLE = ("llama", "qwen3_moe")


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows, in this process.

    It works in ``job.scratch`` and leaves its checkpoint there: the same job goes on after the last finished layer.
    """
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
        "kept_float": sorted(job.kept_float),
        "resumable": _resumable(job),
        "trust_remote_code": options.trust_remote_code,
        "windows": [row.tolist() for row in job.windows()],
    }
    tell(begun={"matrices": len(job.linears), "lost_because": _why_lost(job)})
    if not ((folder / "job.json").is_file() and read_json(folder / "job.json") == order):
        remove(folder)
        folder.mkdir(parents=True)
        write_json(folder / "job.json", order)
    elif (folder / "checkpoint" / "CURRENT").is_file():
        log.info("quantize: GPTQ goes on after the last layer finished before the interruption")
    else:
        log.info("quantize: GPTQ begins anew, what was done before the interruption is lost%s", _why_lost(job))
    with contextlib.chdir(folder):  # it leaves a folder of logs where it stands
        _run(order)
    _give_back()
    return read_checkpoint(folder / "model", job.linears)


def _resumable(job: QuantizeJob) -> bool:
    return read_json(job.folder / "config.json").get("model_type") in RESUMABLE and not job.exceptions and not job.kept_float


def _why_lost(job: QuantizeJob) -> str:
    family = read_json(job.folder / "config.json").get("model_type")
    if family not in RESUMABLE:
        return f" (gptqmodel resumes {' and '.join(RESUMABLE)} alone, and this is {family})"
    return "" if _resumable(job) else " (--bits-for cannot be resumed)"


def _run(job: dict[str, Any]) -> None:
    """Quantize and save into ``model`` of the working directory."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.looper.checkpoint_store import CheckpointConfig

    here = Path.cwd()
    exceptions = {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in job["exceptions"].items()}
    exceptions |= {f"-:^{re.escape(name)}$": {} for name in job["kept_float"]}
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        desc_act=job["desc_act"],
        act_group_aware=False,
        dynamic=exceptions or None,
        pack_impl="original",  # the others compile an extension on first use: half a minute, and a compiler needed
        offload_to_disk_path=str(here / "offload"),
    )
    settings: dict[str, Any] = {"device": "cpu", "trust_remote_code": job["trust_remote_code"]}
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, **settings)  # it would take bfloat16 by itself
    # gptqmodel wants plain dicts of lists
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["windows"]]
    checkpoint = CheckpointConfig(path=str(here / "checkpoint")) if job["resumable"] else None
    model.quantize(rows, batch_size=4, checkpoint=checkpoint)
    model.save(str(here / "model"))
    model.model = None  # gptqmodel holds on to the object around it


def _give_back() -> None:
    """Hand free memory back to the system: glibc keeps what gptqmodel has freed, and the stage goes on in this process."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def read_checkpoint(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, PackedLinear]:
    """The checkpoint that gptqmodel wrote for us, whose label is to be trusted."""
    config = read_json(folder / "quantize_config.json")
    found = GptqFolder(folder, sorted(folder.glob("*.safetensors")), config, format=config["checkpoint_format"])
    return {name: found[name] for name in found if name in shapes}
