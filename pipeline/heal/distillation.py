"""Distillation on recorded states: windows with what left the whole model's last block, and the losses that pull towards it."""

from __future__ import annotations

import numpy as np
import torch
from edgepress.pipeline.checkpoint.blocks import BlockArgs, BlockOutput, Blocks, block_output
from edgepress.pipeline.heal.job import HealJob
from edgepress.pipeline.options import HealOptions
from transformers import Trainer

CONTRAST_TEMPERATURE = 0.1


class RecordedWindows(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Windows with the states that left the whole model's last block, and the pruned model's before healing."""

    def __init__(self, job: HealJob, snapshot: list[np.ndarray] | None) -> None:
        self.windows, self.starts, self.snapshot = job.windows, job.starts(), snapshot
        self.states = job.teacher[max(job.teacher)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = {"ids": self.windows[index], "states": np.array(self.states[self.starts[index] : self.starts[index + 1]])}
        return item | ({"snapshot": self.snapshot[index]} if self.snapshot else {})


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Right-padded: ids, real (batch, tokens), states (batch, tokens, hidden), snapshot (batch, hidden)."""
    longest = max(len(item["ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    real = torch.zeros(len(items), longest, dtype=torch.bool)
    states = torch.zeros(len(items), longest, items[0]["states"].shape[1])
    for row, item in enumerate(items):
        count = len(item["ids"])
        ids[row, :count], real[row, :count] = torch.from_numpy(item["ids"]), True
        states[row, :count] = torch.from_numpy(item["states"])
    batch = {"ids": ids, "real": real, "states": states}
    if "snapshot" in items[0]:
        batch["snapshot"] = torch.from_numpy(np.stack([item["snapshot"] for item in items]))
    return batch


class Distiller(Trainer):  # type: ignore[misc]
    """KL(whole model || model) a token, plus the contrastive term where it has a weight."""

    def __init__(self, *args: object, blocks: Blocks, options: HealOptions, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.blocks, self.options, self.losses = blocks, options, list[float]()

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: object
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of one batch of ``collate``; the signature is Trainer's."""
        model.eval()  # no dropout: the whole model had none when it was recorded
        ids, real, states = inputs["ids"], inputs["real"], inputs["states"]
        with torch.no_grad(), self.blocks.entering(len(self.blocks), states):
            reference = self.blocks.model(input_ids=ids, use_cache=False).logits[real].float() / self.options.temperature
        leaving: list[torch.Tensor] = []

        def see(module: torch.nn.Module, args: BlockArgs, output: BlockOutput) -> None:
            leaving.append(block_output(output))

        handle = self.blocks.modules[-1].register_forward_hook(see)
        try:
            logits = model(input_ids=ids, use_cache=False).logits[real].float() / self.options.temperature
        finally:
            handle.remove()
        divergence = torch.nn.functional.kl_div(
            torch.log_softmax(logits, -1), torch.log_softmax(reference, -1), reduction="batchmean", log_target=True
        )
        loss = divergence * self.options.temperature**2
        self.losses.append(float(divergence.detach()))
        if self.options.contrastive and len(ids) > 1:
            loss = loss + self.options.contrastive * contrast(
                sentences(leaving[0], real), [sentences(states, real), inputs["snapshot"]]
            )
        return (loss, {"loss": loss}) if return_outputs else loss


def sentences(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean state of each window over its real tokens, (batch, hidden)."""
    return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def contrast(states: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """Each window's state is pulled to the same window's in each other model and pushed from other windows' there.

    InfoNCE over cosines, as in Contrastive Pruning (Xu et al. 2022, section 3.2): others are the original and the
    snapshot before healing, (batch, hidden) each.
    """
    terms = []
    for other in others:
        cosines = torch.nn.functional.normalize(states, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T
        terms.append(
            torch.nn.functional.cross_entropy(cosines / CONTRAST_TEMPERATURE, torch.arange(len(states), device=states.device))
        )
    return torch.stack(terms).mean()


def mean_states(blocks: Blocks, windows: list[np.ndarray]) -> list[np.ndarray]:
    """The mean state that leaves the last block, a window at a time."""
    return [blocks.states(torch.from_numpy(row)[None], [len(blocks)])[len(blocks)][0].mean(0).numpy() for row in windows]
