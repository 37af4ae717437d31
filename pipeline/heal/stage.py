"""Healing after removal: weights move towards the whole model's states, kept only if perplexity improves on two held-out texts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from edgepress.models.families import PARTS
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import part_name
from edgepress.pipeline.checkpoint.update import replace_tensors, stored_dtype, stored_dtypes
from edgepress.pipeline.checkpoint.weight_file import let_go
from edgepress.pipeline.errors import EdgepressError, ModelError, OptionError, ProofError
from edgepress.pipeline.files import JsonObject, remove, sha256
from edgepress.pipeline.heal.job import Gap, HealJob, gaps_of
from edgepress.pipeline.heal.origin import check_original, kept_layers
from edgepress.pipeline.heal.outcome import Change, Outcome
from edgepress.pipeline.heal.teacher import record
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import HealOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.registry import load
from edgepress.pipeline.text.calibration import HealingSets, healing_sets

log = logging.getLogger("edgepress")
# Name in --healer -> function HealJob -> facts; "linear+lora" runs one after the other.
HEALERS = {"linear": "edgepress.pipeline.heal.linear:heal", "lora": "edgepress.pipeline.heal.lora:heal"}


def heal(source: Artifact, out: Path, options: HealOptions) -> JsonObject:
    """Write ``source`` healed into ``out``, or as it is when healing did not help; returns the facts for the manifest.

    Raises OptionError without an original, ModelError when ``source`` does not name the layers removed.
    """
    if options.original is None:
        raise OptionError("heal needs the model as it was before layers were removed; give --original DIR")
    original = Checkpoint(options.original, options.trust_remote_code)
    kept = kept_layers(source, original)
    pruned = Checkpoint(source.path, options.trust_remote_code)
    check_original(pruned, original)
    source.copy_to(out, link=options.healer == "none" or not _gaps(pruned, original, kept))
    return heal_checkpoint(Checkpoint(out, options.trust_remote_code), original, kept, options)


def heal_checkpoint(pruned: Checkpoint, original: Checkpoint, kept: list[int], options: HealOptions) -> JsonObject:
    """Heal the checkpoint ``pruned`` in place, each method judged by itself; returns the facts.

    kept: indices in ``original`` of its layers. Interrupted training is kept beside its folder, and the same call goes on with it.
    """
    gaps = _gaps(pruned, original, kept)
    if not gaps or options.healer == "none":
        why = "as requested" if gaps else "nothing was removed"
        log.info("heal: left as it is, %s", why)
        return {"methods": [], "accepted": False, "why": why}
    options = with_text(options, original.path)
    texts = healing_sets(original.path, options)
    scratch = pruned.path.parent / f"{pruned.path.name}.healing"
    with (
        _kept_if_begun(scratch),
        tempfile.TemporaryDirectory(prefix=".edgepress-states-", dir=pruned.path.parent) as states,
    ):
        # In a function of its own: the mapped files in ``states`` are closed before their folder is deleted.
        outcomes = _heal(pruned, original, gaps, texts, options, scratch, Path(states))
    remove(scratch)
    return {
        "methods": [outcome.facts() for outcome in outcomes],
        "accepted": any(outcome.accepted for outcome in outcomes),
        "held_out_perplexity": [outcomes[0].held_out_perplexity[0], outcomes[-1].held_out_perplexity[1]],
        "calibration": {"sha256": sha256(options.calibration), "other_text_sha256": sha256(options.other_text)}
        | {name: sum(map(len, getattr(texts, name))) for name in ("fit", "selection", "judging", "other_selection", "other")},
    }


def _gaps(pruned: Checkpoint, original: Checkpoint, kept: list[int]) -> list[Gap]:
    """Where layers were removed, and which of the ``kept`` ones lack a part that they had."""
    lost = [
        [part for part in PARTS if part_name(index, part) in pruned.silent and part_name(former, part) not in original.silent]
        for index, former in enumerate(kept)
    ]
    empty = {index for index, parts in enumerate(lost) if len(parts) == len(PARTS)}
    return gaps_of(kept, original.layers, {index for index, parts in enumerate(lost) if parts} - empty, empty)


@contextmanager
def _kept_if_begun(scratch: Path) -> Iterator[None]:
    """Training that was stopped leaves its last checkpoint; anything else leaves nothing."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, EdgepressError) or not any(scratch.rglob("trainer_state.json")):
            remove(scratch)
        raise


def _heal(
    pruned: Checkpoint, original: Checkpoint, gaps: list[Gap], texts: HealingSets, options: HealOptions, scratch: Path, states: Path
) -> list[Outcome]:
    """Record the teacher, load the student, and try each method of ``options.healer`` on what the one before it left."""
    teacher = record(original, texts.fit, sorted({*(gap.target for gap in gaps), original.layers}), states)
    selection = [texts.selection, texts.other_selection]
    job = HealJob(Blocks(pruned.model()), gaps, texts.fit, teacher, selection, options, scratch)
    return [_try(method, job, pruned, texts) for method in options.healer.split("+")]


def _try(method: str, job: HealJob, pruned: Checkpoint, texts: HealingSets) -> Outcome:
    """One method: healed in memory, judged, and written only if both texts are better for it."""
    model = job.student.model
    former = _Former(pruned, model)
    before = [mean_loss(job.student, windows) for windows in (texts.judging, texts.other)]
    try:
        details: JsonObject = load(HEALERS[method])(job)
    except ModelError as error:
        details = {"not_healed": str(error)}
        log.warning("warning: %s cannot heal this model: %s", method, error)
    changed = {name: parameter for name, parameter in model.named_parameters() if former.differs(name, parameter)}
    _round_as_stored(changed, pruned.path)
    after = [mean_loss(job.student, windows) for windows in (texts.judging, texts.other)]
    held_out, other = (Change(*pair) for pair in zip(before, after, strict=True))
    outcome = Outcome(method, len(changed), held_out, other, details)
    if outcome.accepted:
        replace_tensors(pruned.path, {name: parameter.detach() for name, parameter in changed.items()})
        _prove(pruned, job.student, texts.judging[0])
    else:
        with torch.no_grad():
            for name, parameter in changed.items():
                parameter.copy_(former.value(name))
    outcome.report()
    return outcome


class _Former:
    """The parameters as they are now: nothing is kept of those that the files hold, to be read again."""

    def __init__(self, pruned: Checkpoint, model: torch.nn.Module) -> None:
        self._files = replace(pruned)  # of a fresh value: an earlier method may have changed them
        self._kept = dict[str, torch.Tensor]()
        for name, parameter in model.named_parameters():
            stored = self._files.tensor(name)
            if stored is None or stored.shape != parameter.shape or not torch.equal(stored.float(), parameter):
                self._kept[name] = parameter.detach().clone()
            let_go(parameter)

    def value(self, name: str) -> torch.Tensor:
        """A parameter as it was, float32."""
        if name in self._kept:
            return self._kept[name]
        stored = self._files.tensor(name)
        assert stored is not None
        return stored.float()

    def differs(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether a parameter is another than it was."""
        different = not torch.equal(parameter, self.value(name))
        let_go(parameter)
        return different


def _round_as_stored(changed: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Round parameters to the type that each has in the files: what is judged is what will be stored."""
    dtypes = stored_dtypes(folder)
    with torch.no_grad():
        for name, parameter in changed.items():
            parameter.copy_(parameter.to(stored_dtype(dtypes, name, folder)).float())


def _prove(pruned: Checkpoint, student: Blocks, window: np.ndarray) -> None:
    """The files must compute what was judged. Raises ProofError."""
    ids = torch.from_numpy(window)[None]
    reloaded = replace(pruned).model()  # of a fresh value: nothing that was read before the files changed
    if not torch.equal(Blocks(reloaded).logits(ids), student.logits(ids)):
        raise ProofError(
            "the healed checkpoint does not compute what the model that was judged computes, so nothing was written; "
            "use another --healer, or --healer none"
        )
