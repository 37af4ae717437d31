"""Layer removal by Block Influence (Men et al. 2024, ShortGPT, section 3), proven on the reloaded checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.models.families import layer_count_key, pruned_config, renamed
from edgepress.pipeline.artifact import Artifact, folder_bytes, read_json, write_json
from edgepress.pipeline.checkpoint import carry_files, decoder_blocks, load_model, shards
from edgepress.pipeline.errors import ModelError, ProofError
from edgepress.pipeline.options import PruneOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.shards import rewrite
from edgepress.pipeline.tokens import batches, text_windows
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
# Perplexity that grows by more than this factor is a broken model rather than a smaller one.
WORRYING = 1.5


def prune(source: Artifact, out: Path, options: PruneOptions) -> dict[str, Any]:
    """Write the checkpoint without the blocks of least influence into ``out``; returns the facts for the manifest.

    Raises OptionError when no block would be left, ProofError when the checkpoint written does not compute
    what the original computes with those blocks skipped.
    """
    config = read_json(source.path / "config.json")
    count_key = layer_count_key(config)
    amount = options.amount(config[count_key])
    windows = text_windows(options.calibration, source.path, budget=options.calibration_tokens, skip=options.calibration_skip)
    model = load_model(source.path, options.trust_remote_code)
    influences, before = block_influence(model, windows)
    removed = sorted(np.argsort(influences, kind="stable")[:amount].tolist())
    kept = [index for index in range(len(influences)) if index not in removed]

    probe = torch.from_numpy(windows[0])[None]
    prefix, _ = decoder_blocks(model)
    parameters = model.num_parameters()
    with skipped(model, removed), torch.inference_mode():
        wanted = model(input_ids=probe, use_cache=False).logits
    del model  # the pruned one is loaded next: both need not stand in memory together

    remove_blocks(source.path, out, prefix, count_key, kept)
    pruned = load_model(out, options.trust_remote_code)
    with torch.inference_mode():
        found = pruned(input_ids=probe, use_cache=False).logits
    if not torch.equal(found, wanted):
        raise ProofError(
            f"without layers {removed} the checkpoint computes something else than the model with them skipped "
            f"(largest difference {float((found - wanted).abs().max()):.3g}); {source.family} keeps per-layer settings that its "
            "config cannot express for these layers, so nothing was written"
        )
    after = perplexity_of(pruned, windows)
    names = ", ".join(map(str, removed)) or "none"
    log.info(
        "prune: removed layers %s of %d; perplexity of the calibration text %.4g -> %.4g", names, len(influences), before, after
    )
    if after > WORRYING * before:
        log.warning("warning: without these layers the model is badly hurt; remove fewer (low influence is no proof of low loss)")
    return {
        "influences": [round(value, 6) for value in influences],
        "removed_layers": removed,
        "layers": [len(influences), len(kept)],
        "parameters": [parameters, pruned.num_parameters()],
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
        "calibration_positions": sum(len(row) for row in windows),
        "calibration_perplexity": [round(before, 4), round(after, 4)],
        "proof": {"tokens": probe.shape[1], "largest_logit_difference": 0.0},
    }


def block_influence(model: PreTrainedModel, windows: list[np.ndarray]) -> tuple[list[float], float]:
    """Block Influence of every decoder block, and the model's perplexity, over windows of token ids.

    BI_i = 1 - E[cos(x_i, x_i+1)], x_i and x_i+1 the residual stream before and after block i for one token
    (ShortGPT, equation 1), in float32 or wider. Taken by hooks on the blocks themselves: the last hidden state that
    transformers returns has passed the final norm, which would falsify the last block.
    Raises ModelError that names the first block whose output is not finite.
    """
    _, blocks = decoder_blocks(model)
    sums = np.zeros(len(blocks))
    tokens, nats, scored = 0, 0.0, 0

    def measure(index: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = block_input(args, kwargs), block_output(output)
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).double()
            if not torch.isfinite(cosine).all():
                raise ModelError(f"the output of layer {index} is not finite (NaN or Inf); the checkpoint is broken there")
            sums[index] += float((1 - cosine).sum())

        return hook

    handles = [block.register_forward_hook(measure(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with torch.inference_mode():
            for rows in progress(batches(windows, _batch(model, windows)), "block influence", "batch"):
                ids = torch.from_numpy(rows)
                losses = next_token_losses(model(input_ids=ids, use_cache=False).logits, ids)
                tokens, nats, scored = tokens + ids.numel(), nats + float(losses.double().sum()), scored + losses.numel()
    finally:
        for handle in handles:
            handle.remove()
    return (sums / tokens).tolist(), float(np.exp(nats / scored))


def _batch(model: PreTrainedModel, windows: list[np.ndarray]) -> int:
    """Windows at a time, 8 at most, so that the float32 logits of a large vocabulary stay near a quarter of a gigabyte."""
    return int(min(8, max(1, 2**26 // (len(windows[0]) * model.config.vocab_size))))


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats, float32 (batch * (tokens - 1),), of every id after the first of its window."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


def perplexity_of(model: PreTrainedModel, windows: list[np.ndarray]) -> float:
    """Perplexity of a torch model over windows of token ids."""
    nats, scored = 0.0, 0
    with torch.inference_mode():
        for rows in progress(batches(windows, _batch(model, windows)), "perplexity", "batch"):
            ids = torch.from_numpy(rows)
            losses = next_token_losses(model(input_ids=ids, use_cache=False).logits, ids)
            nats, scored = nats + float(losses.double().sum()), scored + losses.numel()
    return float(np.exp(nats / scored))


def remove_blocks(source: Path, out: Path, prefix: str, count_key: str, kept: Sequence[int]) -> None:
    """Write ``source`` with only the ``kept`` blocks (old indices, ascending) into the folder ``out``.

    Weights keep their dtype and bytes; tokenizer and generation config are carried over.
    """
    base = prefix.split(".", 1)[-1]  # some checkpoints leave the base model's prefix out of their names
    rewrite(shards(source), out, lambda name: renamed(name, base, kept))
    carry_files(source, out)
    write_json(out / "config.json", pruned_config(read_json(source / "config.json"), count_key, kept))


@contextmanager
def skipped(model: PreTrainedModel, removed: Sequence[int]) -> Iterator[None]:
    """Within the context the blocks ``removed`` hand their input on unchanged."""
    _, blocks = decoder_blocks(model)

    def identity(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = block_input(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [blocks[index].register_forward_hook(identity, with_kwargs=True) for index in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states given to a block, (batch, tokens, hidden)."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def block_output(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, (batch, tokens, hidden)."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
