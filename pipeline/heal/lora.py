"""Healing by distillation: low-rank changes (Hu et al. 2021, LoRA) of the kept blocks, trained towards the whole model's logits.

The whole model is not in memory: what left its last block was recorded, and since removal touches neither the final norm nor
the head, running those of the pruned model on the recorded states gives the whole model's logits. peft adds the low-rank
matrices and merges them; transformers' Trainer trains, keeps checkpoints and resumes after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.checkpoint.load import quiet
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import JsonObject, remove
from edgepress.pipeline.heal.distillation import Distiller, RecordedWindows, collate, mean_states
from edgepress.pipeline.heal.job import HealJob
from edgepress.pipeline.progress import bar
from edgepress.pipeline.registry import require
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

log = logging.getLogger("edgepress")
BATCH = 8
CHECKPOINTS = 10  # in a whole training


@dataclass(frozen=True)
class _Training:
    """How many matrices were trained in how many steps, and the mean loss of the first and of the last tenth of the steps."""

    matrices: int
    steps: int
    rank: int
    training_loss: list[float] | None

    def facts(self) -> JsonObject:
        """For the manifest."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def heal(job: HealJob) -> JsonObject:
    """Train, merge, and return what was trained and how the loss fell. Raises MissingPackageError without peft."""
    require("peft")
    from peft import LoraConfig, get_peft_model

    options, blocks = job.options, job.student
    names = _matrices(job)
    torch.manual_seed(0)
    snapshot = mean_states(blocks, job.windows) if options.contrastive else None
    folder = _training_folder(job, names)
    blocks.model.name_or_path = str(options.original)  # else peft asks the hub for a config at every checkpoint
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on checkpoints that nobody but us reads
        conv = any(isinstance(blocks.model.get_submodule(name), Conv1D) for name in names)
        settings = LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, lora_dropout=0.0, target_modules=names, fan_in_fan_out=conv
        )  # fmt: skip
        adapted = get_peft_model(blocks.model, settings)
        try:
            _check_trained(adapted, names)
            losses, steps = _train(job, adapted, folder, snapshot)
        finally:
            with torch.no_grad():
                adapted.merge_and_unload()
            blocks.model.to("cpu").eval().requires_grad_(True)
    remove(folder)
    return _Training(len(names), steps, options.lora_rank, _first_and_last(losses)).facts()


def _first_and_last(losses: list[float]) -> list[float] | None:
    """Means over the first and the last tenth; None without a step, and with a warning where the training diverged."""
    if not np.isfinite(losses).all():
        log.warning("warning: the training diverged; lower --learning-rate")
        return None
    edge = max(1, len(losses) // 10)
    return [round(float(np.mean(part)), 5) for part in (losses[:edge], losses[-edge:])] if losses else None


def _check_trained(adapted: torch.nn.Module, names: list[str]) -> None:
    """Raise ModelError where peft trains more than ``names``: it maps names of dense matrices to fused experts."""
    trained = {name.partition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    others = [module for module in trained if not any(module.endswith(name) for name in names)]
    if others:
        raise ModelError(f"its experts are fused, and peft would train {others[0].removeprefix('base_model.model.')} as a whole")


def _train(job: HealJob, adapted: torch.nn.Module, folder: Path, snapshot: list[np.ndarray] | None) -> tuple[list[float], int]:
    """Train, from the last checkpoint if there is one; returns the divergences seen, step by step, and the number of steps."""
    options, data = job.options, RecordedWindows(job, snapshot)
    batch = min(BATCH, len(data))
    steps = max(1, math.ceil(options.lora_tokens / (batch * max(map(len, job.windows)))))
    trainer = Distiller(
        model=adapted, args=_settings(folder, steps, batch, options.learning_rate), train_dataset=data, data_collator=collate,
        blocks=job.student, options=options, callbacks=[_Bar(steps)],
    )  # fmt: skip
    trainer.pop_callback(PrinterCallback)
    last = _last_checkpoint(folder)
    if last:
        log.info("heal: resuming training at step %s of %d", last.name.rpartition("-")[2], steps)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.losses, steps


def _settings(folder: Path, steps: int, batch: int, learning_rate: float) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 10),
        weight_decay=0.0,
        seed=0,
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def _matrices(job: HealJob) -> list[str]:
    """Names of the matrices to train: of all kept blocks, or of those nearest the gaps."""
    blocks, reach = job.student, job.options.lora_blocks
    near = {
        index
        for index in range(len(blocks))
        for gap in job.gaps
        if not reach or -reach < index - gap.before <= reach
    }  # fmt: skip
    return [
        f"{blocks.name}.{index}.{name}"
        for index in sorted(near)
        for name, module in blocks.modules[index].named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]


def _training_folder(job: HealJob, names: list[str]) -> Path:
    """A checkpoint folder for exactly this training: with another text, model or setting there is nothing to resume from."""
    digest = hashlib.sha256(json.dumps([names, repr(job.options)]).encode())
    for row in job.windows:
        digest.update(row.tobytes())
    for name, parameter in job.student.model.named_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    folder = job.scratch / digest.hexdigest()[:16]
    if not folder.exists():
        remove(job.scratch)  # of another training
    return folder


def _last_checkpoint(folder: Path) -> Path | None:
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Bar(TrainerCallback):  # type: ignore[misc]
    """Progress with time left."""

    def __init__(self, steps: int) -> None:
        self.bar = bar("distillation", steps, "step")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.close()
