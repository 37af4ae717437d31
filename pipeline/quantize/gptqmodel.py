"""GPTQ (Frantar et al. 2022) through gptqmodel.

gptqmodel patches libraries and prints a great deal, so the stage runs in an isolated process. What gptqmodel writes is read
from its checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from edgepress.pipeline.checkpoint.importers.gptq import GptqFolder
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.shards import INDEX, ShardIndex, shards
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.files import read_json, remove, write_json
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.quantize.isolated import Begun, output_watched, report_begun, report_progress
from edgepress.pipeline.quantize.job import QuantizeJob, taken_up

log = logging.getLogger("edgepress")
# gptqmodel 7.6 can resume these, and only where every matrix has the same bits.
RESUMABLE = ("llama", "qwen3_moe")
CHECKPOINT = "checkpoint/CURRENT"  # exists once a layer is finished


@dataclass(frozen=True)
class GptqSettings:
    """All that decides what gptqmodel writes of a model: see ``taken_up``.

    model: path of the checkpoint folder. exceptions: bits and group size of single matrices. windows: token ids. The rest as
    gptqmodel calls it.
    """

    model: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    exceptions: dict[str, list[int]]
    untouched: list[str]
    resumable: bool
    trust_remote_code: bool
    windows: list[list[int]]


def quantize(job: QuantizeJob) -> dict[str, PackedLinear]:
    """Every matrix of the job by GPTQ over the calibration windows, in this process.

    It works in ``job.scratch`` and leaves its checkpoint there: the same job resumes after the last finished layer.
    """
    for name, shape in job.linears.items():
        if job.format(name)[0] == 3 and any(n % 32 for n in shape):
            raise OptionError(f"gptqmodel packs 3 bits only where 32 divides both sides, and not {name}; use --bits 4 or 2")
    folder, settings, lost_because = job.scratch, _settings(job), _why_lost(job)
    report_begun(Begun(len(job.linears), CHECKPOINT, lost_because))
    if taken_up(job, asdict(settings), "gptqmodel"):
        if (folder / CHECKPOINT).is_file():
            log.info("quantize: GPTQ resumes after the last layer finished before the interruption")
        else:
            log.info("quantize: GPTQ starts over, its progress before the interruption is lost%s", lost_because)
    model = str(_float_source(job, folder.resolve()))  # before the current folder is another, from which a path leads elsewhere
    with contextlib.chdir(folder), output_watched(_show_progress):  # it leaves a folder of logs in the current one
        _run(replace(settings, model=model))
    release_memory()
    return read_checkpoint(folder / "model", job.linears)


def _settings(job: QuantizeJob) -> GptqSettings:
    options, folder = job.options, job.checkpoint.path
    return GptqSettings(
        model=str(folder.resolve()),
        bits=options.weight_bits,
        group_size=options.group,
        sym=options.symmetric,
        desc_act=options.act_order,
        exceptions={name: list(form) for name, form in job.exceptions.items()},
        untouched=sorted(job.untouched),
        resumable=_resumable(job),
        trust_remote_code=job.checkpoint.trust_remote_code,
        windows=[row.tolist() for row in job.windows()],
    )


def _resumable(job: QuantizeJob) -> bool:
    return job.checkpoint.raw_config.get("model_type") in RESUMABLE and not job.exceptions and not job.untouched


def _why_lost(job: QuantizeJob) -> str:
    family = job.checkpoint.raw_config.get("model_type")
    if family not in RESUMABLE:
        return f" (gptqmodel can resume only {' and '.join(RESUMABLE)}, and this is {family})"
    spared = job.checkpoint.spared(job.untouched)
    because = ("--keep-codes" if spared & job.checkpoint.weights.matrices else "--parts") if spared else "--bits-for"
    return "" if _resumable(job) else f" ({because} cannot be resumed)"


def _show_progress(printed: str) -> None:
    """Pass on what gptqmodel prints: a line for every matrix, and the number of the layer."""
    layers = re.findall(r"Quantizing layer (\d+) of (\d+)", printed)
    step = f"layer {layers[-1][0]} of {layers[-1][1]}" if layers else ""
    report_progress(printed.count("'process': 'gptq'"), step)


def _float_source(job: QuantizeJob, scratch: Path) -> Path:
    """The folder that gptqmodel reads: the job's, or a float copy in ``scratch`` where some of its matrices are codes."""
    source = job.checkpoint
    if not source.weights.matrices:
        return source.path.resolve()
    copy = scratch / "float"
    source.model().save_pretrained(copy)
    carry_files(source.path, copy, source.trust_remote_code)
    return copy


def _run(settings: GptqSettings) -> None:
    """Quantize and save into ``model`` of the working directory."""
    # Without a worker count that fits the machine gptqmodel refuses to start on few cores; it reads this when imported.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, os.cpu_count() or 2))
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.looper.checkpoint_store import CheckpointConfig

    here = Path.cwd()
    exceptions: dict[str, dict[str, int]] = {
        f"+:^{re.escape(name)}$": {"bits": bits, "group_size": group} for name, (bits, group) in settings.exceptions.items()
    }
    exceptions |= {f"-:^{re.escape(name)}$": {} for name in settings.untouched}
    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.sym,
        desc_act=settings.desc_act,
        act_group_aware=False,
        dynamic=exceptions or None,
        pack_impl="original",  # the others compile an extension on first use: half a minute, and a compiler needed
        offload_to_disk_path=str(here / "offload"),
    )
    model = GPTQModel.load(
        str(_source_folder(Path(settings.model), here / "source", settings.trust_remote_code)),
        config,
        dtype=torch.float32,  # it would take bfloat16 by itself
        device="cpu",
        trust_remote_code=settings.trust_remote_code,
    )
    # gptqmodel requires plain dicts of lists
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in settings.windows]
    checkpoint = CheckpointConfig(path=str(here / "checkpoint")) if settings.resumable else None
    model.quantize(rows, batch_size=4, checkpoint=checkpoint)
    model.save(str(here / "model"))
    model.model = None  # gptqmodel holds on to the object around it


def _source_folder(checkpoint: Path, out: Path, trusted: bool) -> Path:
    """The checkpoint in a folder of its own, without code unless it is ``trusted``.

    gptqmodel's tokenizer helper runs the code of a tokenizer that it cannot read, whatever it is told, and it reads whatever
    weights it finds. Here are the float weights that count, under the names that it looks for, and no pickled ones or adapters.
    They are hard links (or copies, on another file system): it refuses weights that are links, as all are in a hub cache.
    """
    remove(out)
    out.mkdir()
    carry_files(checkpoint, out, trusted)
    (out / "adapter_config.json").unlink(missing_ok=True)
    write_json(out / "config.json", read_json(checkpoint / "config.json"))
    files = shards(checkpoint)
    names = ["model.safetensors"] if len(files) == 1 else [file.name for file in files]
    for file, name in zip(files, names, strict=True):
        try:
            (out / name).hardlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, out / name)
    if len(files) > 1:
        places = {name: header.file.name for header in ShardIndex(files).headers for name in header.entries}
        write_json(out / INDEX, {"metadata": {}, "weight_map": places})
    return out


def read_checkpoint(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, PackedLinear]:
    """The checkpoint that gptqmodel wrote for us, whose label is to be trusted."""
    config = read_json(folder / "quantize_config.json")
    matrices = GptqFolder(folder, ShardIndex(sorted(folder.glob("*.safetensors"))), config, format=config["checkpoint_format"])
    return {name: matrices[name] for name in matrices if name in shapes}
