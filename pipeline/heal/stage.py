"""Healing after removal: weights changed towards the whole model's states, accepted only if two kinds of text get better."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgepress.models.config import layer_count_key
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.load import load_model
from edgepress.pipeline.checkpoint.shards import rows_of
from edgepress.pipeline.checkpoint.source import check_checkpoint
from edgepress.pipeline.checkpoint.update import replace_tensors, stored_dtype, stored_dtypes
from edgepress.pipeline.checkpoint.weights import read_tensor
from edgepress.pipeline.errors import EdgepressError, ModelError, OptionError, ProofError
from edgepress.pipeline.files import files_below, read_json, remove, sha256
from edgepress.pipeline.heal.job import HealJob, gaps_of
from edgepress.pipeline.metrics.torch_scores import batches, mean_loss, perplexity
from edgepress.pipeline.options import HealOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.registry import load
from edgepress.pipeline.text.calibration import Texts, split

log = logging.getLogger("edgepress")
REFUSED = "; the checkpoint stays as it was (--other-text takes a text of a kind that this model is meant for)"


def heal(source: Artifact, out: Path, options: HealOptions) -> dict[str, Any]:
    """Write ``source`` healed into ``out``, or as it is when healing did not help; returns the facts for the manifest.

    Raises OptionError without an original, ModelError when ``source`` does not say which layers were removed.
    """
    if options.original is None:
        raise OptionError("heal needs the model as it was before layers were removed; give --original DIR")
    kept, layers = kept_layers(source, options.original)
    check_original(source.path, options.original, options.trust_remote_code)
    for file in files_below(source.path):
        target = out / file.relative_to(source.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    return heal_folder(out, options.original, kept, layers, options)


def kept_layers(source: Artifact, original: Path) -> tuple[list[int], int]:
    """Indices, in the original's count, of the layers that ``source`` has, and the count.

    Raises ModelError when ``source`` was never pruned, OptionError when it was not pruned from a model of so many layers.
    """
    raw = read_json(original / "config.json")
    layers = raw[layer_count_key(raw)]
    steps = [step.facts for step in source.steps if step.stage == "prune"]
    if not steps:
        raise ModelError(f"the manifest of {source.path} does not say which layers were removed; give a folder that prune wrote")
    kept = list(range(steps[-1]["layers"][1]))
    for facts in reversed(steps):  # the last removal counts in what the one before it left
        before = [index for index in range(facts["layers"][0]) if index not in facts["removed_layers"]]
        kept = [before[place] for place in kept]
        if facts["layers"][0] == layers:
            return kept, layers
    raise OptionError(
        f"{original} has {layers} layers, and {source.path} was not pruned from such a model; give --original that one"
    )


def check_original(source: Path, original: Path, trust_remote_code: bool) -> None:
    """What removal leaves alone must be the same in both. Raises OptionError that names what differs."""
    check_checkpoint(original, trust_remote_code)
    outside = re.compile(r"(?!.*\.\d+\.)(?!\d+\.)")
    for name in filter(outside.match, rows_of(source)):
        own, theirs = read_tensor(source, name), read_tensor(original, name)
        if own is None or theirs is None or not torch.equal(own, theirs):
            raise OptionError(f"{original} is not what {source} was pruned from: {name} differs; give --original that one")


def heal_folder(folder: Path, original: Path, kept: list[int], layers: int, options: HealOptions) -> dict[str, Any]:
    """Heal the checkpoint in ``folder`` in place, each method judged by itself; returns the facts.

    Interrupted training is kept beside ``folder``, and the same call goes on with it.
    """
    scratch = folder.parent / f"{folder.name}.healing"
    facts: dict[str, Any] = {"methods": []}
    gaps = gaps_of(kept, layers)
    if not gaps or options.healer == "none":
        why = "as told" if gaps else "no layer was removed"
        log.info("heal: left as it is, %s", why)
        return facts | {"accepted": False, "why": why}
    texts = split(original, options)
    with _kept_if_begun(scratch), tempfile.TemporaryDirectory(prefix=".edgepress-states-", dir=folder.parent) as states:
        teacher = record(
            original, texts.fit, sorted({*(gap.target for gap in gaps), layers}), Path(states), options.trust_remote_code
        )
        student = Blocks(load_model(folder, options.trust_remote_code))
        job = HealJob(student, gaps, texts.fit, teacher, [texts.selection, texts.other_selection], options, scratch)
        for method in options.healer.split("+"):
            facts["methods"].append({"method": method} | _one(folder, job, method, texts))
        del teacher, job  # mapped files are closed before their folder goes
    remove(scratch)
    accepted = [method["method"] for method in facts["methods"] if method["accepted"]]
    return facts | {
        "accepted": bool(accepted),
        "held_out_perplexity": [facts["methods"][0]["held_out_perplexity"][0], facts["methods"][-1]["held_out_perplexity"][-1]],
        "calibration": {"sha256": sha256(options.calibration), "other_text_sha256": sha256(options.other_text)}
        | {name: sum(map(len, getattr(texts, name))) for name in ("fit", "selection", "judging", "other_selection", "other")},
    }


@contextmanager
def _kept_if_begun(scratch: Path) -> Iterator[None]:
    """Training that was stopped leaves its last checkpoint; anything else leaves nothing."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, EdgepressError) or not any(scratch.rglob("trainer_state.json")):
            remove(scratch)
        raise


def _one(folder: Path, job: HealJob, method: str, texts: Texts) -> dict[str, Any]:
    """One method: healed in memory, judged, and written only if both texts are better for it."""
    model = job.student.model
    former = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = [mean_loss(model, rows) for rows in (texts.judging, texts.other)]
    try:
        found = load(f"edgepress.pipeline.heal.{method}:heal")(job)
    except ModelError as error:
        found = {"not_healed": str(error)}
        log.warning("warning: %s cannot heal this model: %s", method, error)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, former[name])}
    dtypes = stored_dtypes(folder)
    with torch.no_grad():  # judged is what will be stored, rounded to the checkpoint's type
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter.copy_(parameter.to(stored_dtype(dtypes, name, folder)).float())
    after = [mean_loss(model, rows) for rows in (texts.judging, texts.other)]
    better = [own < former_loss for own, former_loss in zip(after, before, strict=True)]  # NaN is not better
    accepted = bool(changed) and all(better)
    perplexities = [[perplexity(loss) for loss in pair] for pair in zip(before, after, strict=True)]
    shown = " and ".join(f"{kind} {b:.4g} -> {a:.4g}" for kind, (b, a) in zip(("held-out", "other"), perplexities, strict=True))
    if accepted:
        replace_tensors(folder, {name: p.detach() for name, p in model.named_parameters() if name in changed})
        _prove(folder, job, texts.judging[0])
        log.info("heal: %s accepted; perplexity of %s text", method, shown)
    elif changed:
        with torch.no_grad():
            for name in changed:
                model.get_parameter(name).copy_(former[name])
        log.warning("warning: %s did not help both kinds of text (perplexity of %s)%s", method, shown, REFUSED)
    else:
        log.info("heal: %s found no change that helps both kinds of text%s", method, REFUSED)
    judged = {"held_out_perplexity": perplexities[0], "other_perplexity": perplexities[1]}
    if not accepted:
        judged = {f"rejected_{key}": value for key, value in judged.items()} | {
            "held_out_perplexity": [perplexities[0][0]] * 2,
            "other_perplexity": [perplexities[1][0]] * 2,
        }
    return {"accepted": accepted, "changed_tensors": len(changed), **judged, **found}


def record(
    original: Path, windows: list[np.ndarray], wanted: list[int], scratch: Path, trust_remote_code: bool
) -> dict[int, np.ndarray]:
    """What enters the blocks ``wanted`` of the model in ``original`` over the windows: (tokens, hidden) float32, mapped from files.

    So the whole model and the one to heal never stand in memory together.
    """
    blocks = Blocks(load_model(original, trust_remote_code))
    tokens, width = sum(map(len, windows)), blocks.model.config.hidden_size
    kept = {i: np.memmap(scratch / f"{i}.float32", dtype=np.float32, mode="w+", shape=(tokens, width)) for i in wanted}
    row = 0
    for ids, real in progress(batches(blocks.model, windows), "states of the whole model", "batch"):
        states = blocks.states(ids, wanted)
        for index, rows in kept.items():
            rows[row : row + int(real.sum())] = states[index][real].numpy()
        row += int(real.sum())
    return dict(kept)


def _prove(folder: Path, job: HealJob, window: np.ndarray) -> None:
    """The files must compute what was judged. Raises ProofError."""
    ids = torch.from_numpy(window)[None]
    found = Blocks(load_model(folder, job.options.trust_remote_code)).logits(ids)
    if not torch.equal(found, job.student.logits(ids)):
        raise ProofError("the healed checkpoint computes something else than the model that was judged, so it was thrown away")
