"""The narrow stage: choose channels block by block, refit, write the narrower checkpoint, and prove it on the reloaded one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import BlockArgs, Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.least_squares import Sums
from edgepress.pipeline.checkpoint.parts import parameters_left
from edgepress.pipeline.checkpoint.residual import residual_factor
from edgepress.pipeline.checkpoint.update import carry_files, replace_tensors, stored_dtype, stored_dtypes
from edgepress.pipeline.errors import ModelError, OptionError, ProofError
from edgepress.pipeline.files import JsonObject, folder_bytes, sha256, write_json
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.metrics.readable import warn_unless_readable
from edgepress.pipeline.metrics.torch_scores import batches, mean_loss, perplexity
from edgepress.pipeline.narrow.feed_forward import FeedForward, find
from edgepress.pipeline.narrow.fit import least, refit
from edgepress.pipeline.options import NarrowOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.progress import progress
from edgepress.pipeline.report.attribution import WORRYING
from edgepress.pipeline.text.calibration import calibration
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("edgepress")
TABLE = "kept_channels.json"
_STEPS = ((1024, 64), (128, 32), (0, 8))  # from this width on, a multiple of that: what kernels and groups of weights like


WINDOW, FIRST = 128, 4.0  # tokens; the first one's weight: short windows, so that many tokens have been the first


@dataclass
class _Batch:
    """ids, real (windows, tokens); whole, narrow: what enters the next block of either model, (windows, tokens, hidden)."""

    ids: torch.Tensor
    real: torch.Tensor
    whole: torch.Tensor
    narrow: torch.Tensor


def foresee(source: Path, options: NarrowOptions, removed: int) -> None:
    """Raise what ``narrow`` would raise of the architecture and the share, whatever layers are ``removed`` before."""
    kept_width(find(Checkpoint(source, options.trust_remote_code)).width, options.remove_channels or 0)


def narrow(source: Artifact, out: Path, options: NarrowOptions) -> JsonObject:
    """Write the checkpoint with fewer feed-forward channels, the same number in every block, into ``out``; returns the facts.

    ``kept_channels.json`` there lists those that stayed. Raises OptionError where no channel would stay or go, ModelError for an
    architecture whose config cannot say it, ProofError where what was written computes something else than what was judged.
    """
    checkpoint = Checkpoint(source.path, options.trust_remote_code)
    feed = find(checkpoint)
    assert options.remove_channels is not None
    kept = kept_width(feed.width, options.remove_channels)
    read = checkpoint.remarks("narrow")
    stored = stored_dtypes(source.path)
    dtypes = {name: stored_dtype(stored, name, source.path) for name in feed.axes}
    options = with_text(options, source.path)
    fit, held_out = calibration(source.path, options, WINDOW)
    blocks = Blocks(checkpoint.model())
    _check_blocks(blocks, fit[0][:32])
    before, parameters = mean_loss(blocks, held_out), parameters_left(blocks.model, checkpoint.silent)
    warn_unless_readable(before, blocks.model.config.get_text_config().vocab_size, options.calibration)
    log.info("narrow: %s of %s channels stay in each of %d blocks", f"{kept:,}", f"{feed.width:,}", len(blocks))
    chosen = _cut(blocks, feed, kept, fit, dtypes, options.refit)
    after = mean_loss(blocks, held_out)
    perplexities = [perplexity(before), perplexity(after)]
    log.info("narrow: perplexity of held-out calibration text %.4g -> %.4g", *perplexities)
    if perplexities[1] > WORRYING * perplexities[0]:
        log.warning("warning: with so few channels the model is badly degraded; give a smaller --remove-channels")
    wanted = blocks.logits(torch.from_numpy(fit[0])[None])
    _write(checkpoint, out, feed, chosen, blocks)
    del blocks
    release_memory()
    written = Checkpoint(out, options.trust_remote_code)
    difference = _prove(written, wanted, fit[0])
    return read | {
        "width": [feed.width, kept],
        "refit": options.refit,
        "channels": {"file": TABLE, "sha256": sha256(out / TABLE)},
        "parameters": [parameters, parameters_left(written.meta_model(), written.silent)],
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
        "held_out_perplexity": perplexities,
        "calibration": {
            "sha256": sha256(options.calibration),
            "positions": sum(map(len, fit)), "held_out_positions": sum(map(len, held_out)),
        },
        "proof": {"tokens": len(fit[0]), "largest_logit_difference": difference},
    }  # fmt: skip


def kept_width(width: int, fraction: float) -> int:
    """How many of ``width`` channels stay: the multiple of what kernels like that is nearest to the share, and fewer than all."""
    step = next(size for least_width, size in _STEPS if width >= least_width)
    kept = min(round(width * (1 - fraction) / step) * step, (width - 1) // step * step)
    if kept < step:
        raise OptionError(
            f"--remove-channels {fraction:g} of {width} channels leaves fewer than {step}, of which they are cut in multiples; "
            + ("give less" if width > step else "leave it out")
        )
    return kept


def _check_blocks(blocks: Blocks, window: np.ndarray) -> None:
    """Raise ModelError unless the last block computes alone what it computes after the others: some take more from them."""
    ids, last = torch.from_numpy(window)[None], len(blocks) - 1
    states = blocks.states(ids, [last, last + 1])
    try:
        alone = torch.equal(_through(blocks, last, ids, states[last]), states[last + 1])
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        alone = False
    if not alone:
        raise ModelError("its blocks share more than the residual stream, so they cannot be narrowed one by one; leave narrow out")


def _cut(
    blocks: Blocks, feed: FeedForward, kept: int, windows: list[np.ndarray], dtypes: dict[str, torch.dtype], fitted: bool
) -> list[torch.Tensor]:
    """Choose and refit block by block, in place: a channel that goes has zeros in the matrix that reads it. Returns those kept.

    Both streams are in memory, 8 bytes a token and a hidden dimension.
    """
    stream = []
    for ids, real in batches(blocks.model, windows):
        states = blocks.states(ids, [0])[0]
        stream.append(_Batch(ids, real, states, states))
    chosen = []
    for index, name in enumerate(progress(feed.down, "channels", "block")):
        module = blocks.model.get_submodule(name)
        transposed = isinstance(module, Conv1D)
        weight = module.weight.detach().T if transposed else module.weight.detach()
        factor = residual_factor(blocks, index, module, stream[0].ids[:1, :32])
        statistics = _statistics(blocks, index, module, stream, weight, factor)
        left = least(statistics, weight, kept)
        columns = refit(statistics, weight, left) if fitted else weight[:, left]
        cut = torch.zeros_like(weight)
        cut[:, left] = columns.to(dtypes[f"{name}.weight"]).to(weight)  # as it will be stored
        with torch.no_grad():
            module.weight.copy_(cut.T if transposed else cut)
        for batch in stream:
            batch.narrow = _through(blocks, index, batch.ids, batch.narrow)
        chosen.append(left)
    return chosen


def _statistics(
    blocks: Blocks, index: int, module: torch.nn.Module, stream: list[_Batch], weight: torch.Tensor, factor: float | None
) -> Sums:
    """What enters the matrix on the narrowed stream, and what that stream lacks; the whole stream moves on behind the block.

    Tokens weigh 1 / length^2 of their state: a few have states a hundred times as long. The first of a window counts for more: all
    others attend to it (Xiao et al. 2023, attention sinks), and it is like no other. Where the output passes a norm before it
    is added, what the stream lacks is unknown to the matrix, and it is fitted to its own former output.
    """
    statistics, seen = Sums.empty(weight.shape[1], weight.shape[0]), list[torch.Tensor]()

    def see(module: torch.nn.Module, args: BlockArgs) -> None:
        seen.append(args[0])

    for batch in stream:
        batch.whole = _through(blocks, index, batch.ids, batch.whole)
        seen.clear()
        handle = module.register_forward_pre_hook(see)
        try:
            leaving = _through(blocks, index, batch.ids, batch.narrow)
        finally:
            handle.remove()
        channels = seen[0].reshape(*batch.real.shape, -1)[batch.real].float()
        target = batch.whole[batch.real]
        missing = (target - leaving[batch.real]) / factor if factor else torch.zeros_like(target)
        lengths = target if factor else channels @ weight.T
        weights = torch.ones(batch.real.shape)
        weights[:, 0] = FIRST
        weights = weights[batch.real][:, None] / lengths.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        statistics.add(channels, missing, weights)
    return statistics


def _through(blocks: Blocks, index: int, ids: torch.Tensor, entering: torch.Tensor) -> torch.Tensor:
    """What leaves block ``index`` when ``entering`` enters it."""
    with blocks.entering(index, entering):
        return blocks.states(ids, [index + 1])[index + 1].float()


def _write(checkpoint: Checkpoint, out: Path, feed: FeedForward, chosen: list[torch.Tensor], blocks: Blocks) -> None:
    """The checkpoint with the channels of ``chosen`` alone."""
    checkpoint.rewrite(out, lambda name: name)
    carry_files(checkpoint.path, out, checkpoint.trust_remote_code)
    write_json(out / "config.json", feed.config(checkpoint.raw_config, len(chosen[0])))
    write_json(out / TABLE, {"kept_channels": [left.tolist() for left in chosen]})
    place = blocks.name.count(".") + 1
    new = {}
    for name, parameter in blocks.model.state_dict().items():
        if (axis := feed.axes.get(name)) is not None:
            left = chosen[int(name.split(".")[place])]
            rows = torch.cat([left + part * feed.width for part in range(axis.times)])
            new[name] = parameter.index_select(axis.axis, rows)
    replace_tensors(out, new)


def _prove(written: Checkpoint, wanted: torch.Tensor, window: np.ndarray) -> float:
    """The largest difference of a logit. Raises ProofError unless the files compute what was judged, up to its order."""
    logits = Blocks(written.model()).logits(torch.from_numpy(window)[None])
    difference = float((logits - wanted).abs().max())
    if not difference <= 1e-4 * float(wanted.std() + wanted.abs().max()):
        raise ProofError(
            f"the written checkpoint's logits differ by up to {difference:.3g} from those of the model without these channels, so "
            "nothing was written; report this"
        )
    return difference
