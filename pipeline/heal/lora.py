"""Healing by distillation: low-rank changes (Hu et al. 2021, LoRA) of the kept blocks, trained towards the whole model's logits.

The whole model is not in memory: what left its last block was recorded, and since removal touches neither the final norm nor
the head, running those of the pruned model on the recorded states gives the whole model's logits. peft makes the changes and
merges them, transformers' Trainer trains, keeps checkpoints and goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import quiet
from edgepress.pipeline.errors import ModelError
from edgepress.pipeline.files import remove
from edgepress.pipeline.heal.job import HealJob
from edgepress.pipeline.progress import bar
from edgepress.pipeline.registry import require
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

log = logging.getLogger("edgepress")
BATCH = 8
CHECKPOINTS = 10  # a run
CONTRAST_TEMPERATURE = 0.1


def heal(job: HealJob) -> dict[str, Any]:
    """Train, merge, and return what was trained and how the loss fell. Raises MissingPackageError without peft."""
    require("peft")
    from peft import LoraConfig, get_peft_model

    options, blocks = job.options, job.student
    names = _matrices(job)
    torch.manual_seed(0)
    snapshot = _states(blocks, job.windows) if options.contrastive else None
    folder = _own_folder(job, names)
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
    edge = max(1, len(losses) // 10)
    found: dict[str, Any] = {"matrices": len(names), "steps": steps, "rank": options.lora_rank}
    if not np.isfinite(losses).all():
        log.warning("warning: the training diverged; lower --learning-rate")
    elif losses:
        found["training_loss"] = [round(float(np.mean(part)), 5) for part in (losses[:edge], losses[-edge:])]
    return found


def _check_trained(adapted: torch.nn.Module, names: list[str]) -> None:
    """Raise ModelError where peft trains what was not asked for: it maps names of dense matrices to fused experts."""
    chosen = {name.partition(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    strange = [name for name in chosen if not any(name.endswith(wanted) for wanted in names)]
    if strange:
        raise ModelError(f"its experts are fused, and peft would train {strange[0].removeprefix('base_model.model.')} as a whole")


def _train(job: HealJob, adapted: Any, folder: Path, snapshot: list[np.ndarray] | None) -> tuple[list[float], int]:
    """Train, from the last checkpoint if there is one; returns the divergences seen, step by step, and the number of steps."""
    options, data = job.options, _Windows(job, snapshot)
    batch = min(BATCH, len(data))
    steps = max(1, math.ceil(options.lora_tokens / (batch * max(map(len, job.windows)))))
    trainer = _Distiller(
        model=adapted, args=_settings(folder, steps, batch, options.learning_rate), train_dataset=data, data_collator=_collate,
        blocks=job.student, options=options, callbacks=[_Bar(steps)],
    )  # fmt: skip
    trainer.pop_callback(PrinterCallback)
    last = _last_checkpoint(folder)
    if last:
        log.info("heal: training goes on at %s of %d steps", last.name.rpartition("-")[2], steps)
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
        place
        for place in range(len(blocks))
        for gap in job.gaps
        if not reach or -reach < place - gap.before <= reach
    }  # fmt: skip
    return [
        f"{blocks.name}.{place}.{name}"
        for place in sorted(near)
        for name, module in blocks.modules[place].named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]


class _Windows(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Windows with the states that left the whole model's last block, and the pruned model's before healing."""

    def __init__(self, job: HealJob, snapshot: list[np.ndarray] | None) -> None:
        self.windows, self.starts, self.snapshot = job.windows, job.starts(), snapshot
        self.states = job.teacher[max(job.teacher)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = {"ids": self.windows[index], "states": np.array(self.states[self.starts[index] : self.starts[index + 1]])}
        return item | ({"snapshot": self.snapshot[index]} if self.snapshot else {})


def _collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Right-padded: ids, real (batch, tokens), states (batch, tokens, hidden), snapshot (batch, hidden)."""
    longest = max(len(item["ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    real = torch.zeros(len(items), longest, dtype=torch.bool)
    states = torch.zeros(len(items), longest, items[0]["states"].shape[1])
    for row, item in enumerate(items):
        count = len(item["ids"])
        ids[row, :count], real[row, :count] = torch.from_numpy(item["ids"]), True
        states[row, :count] = torch.from_numpy(item["states"])
    found = {"ids": ids, "real": real, "states": states}
    if "snapshot" in items[0]:
        found["snapshot"] = torch.from_numpy(np.stack([item["snapshot"] for item in items]))
    return found


class _Distiller(Trainer):  # type: ignore[misc]
    """KL(whole model || model) a token, and where asked for the contrastive term."""

    def __init__(self, *args: Any, blocks: Blocks, options: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks, self.options, self.losses = blocks, options, list[float]()

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        model.eval()  # no dropout: the whole model had none when it was recorded
        ids, real, states = inputs["ids"], inputs["real"], inputs["states"]
        with torch.no_grad(), self.blocks.entering(len(self.blocks), states):
            truth = self.blocks.model(input_ids=ids, use_cache=False).logits[real].float() / self.options.temperature
        left: list[torch.Tensor] = []
        handle = self.blocks.modules[-1].register_forward_hook(
            lambda _, args, output: left.append(output[0] if isinstance(output, tuple) else output)
        )
        try:
            logits = model(input_ids=ids, use_cache=False).logits[real].float() / self.options.temperature
        finally:
            handle.remove()
        divergence = torch.nn.functional.kl_div(
            torch.log_softmax(logits, -1), torch.log_softmax(truth, -1), reduction="batchmean", log_target=True
        )
        loss = divergence * self.options.temperature**2
        self.losses.append(float(divergence.detach()))
        if self.options.contrastive and len(ids) > 1:
            loss = loss + self.options.contrastive * contrast(
                sentences(left[0], real), [sentences(states, real), inputs["snapshot"]]
            )
        return (loss, {"loss": loss}) if return_outputs else loss


def sentences(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean state of each window over its real tokens, (batch, hidden)."""
    return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def contrast(own: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """Each window's state is pulled to the same window's in each other model and pushed from other windows' there.

    InfoNCE over cosines, as in Contrastive Pruning (Xu et al. 2022, section 3.2): others are the original and the
    snapshot before healing, (batch, hidden) each.
    """
    terms = []
    for other in others:
        cosines = torch.nn.functional.normalize(own, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T
        terms.append(torch.nn.functional.cross_entropy(cosines / CONTRAST_TEMPERATURE, torch.arange(len(own), device=own.device)))
    return torch.stack(terms).mean()


def _states(blocks: Blocks, windows: list[np.ndarray]) -> list[np.ndarray]:
    """The mean state that leaves the last block, a window at a time."""
    return [blocks.states(torch.from_numpy(row)[None], [len(blocks)])[len(blocks)][0].mean(0).numpy() for row in windows]


def _own_folder(job: HealJob, names: list[str]) -> Path:
    """A checkpoint folder for exactly this training: another text, model or setting finds nothing to go on from."""
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
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _Bar(TrainerCallback):  # type: ignore[misc]
    """Progress with time left."""

    def __init__(self, steps: int) -> None:
        self.bar = bar("distillation", steps, "step")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
