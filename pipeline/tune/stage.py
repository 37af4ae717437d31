"""Tuning after quantization: what is float learns the original's predictions, kept only if two held-out texts agree.

As EfficientQAT's end-to-end phase (Chen et al. 2024, section 3.3) and mlx-lm's DWQ, with removal in the same bargain: the teacher
is the original before any layer went.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.update import replace_tensors
from edgepress.pipeline.errors import EdgepressError, OptionError, ProofError
from edgepress.pipeline.files import JsonObject, read_json, remove, sha256, write_json
from edgepress.pipeline.machine import prefers_bfloat16, release_memory, training_device
from edgepress.pipeline.metrics.torch_scores import divergences, logits_of
from edgepress.pipeline.options import SELF, TuneOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.text.calibration import healing_sets
from edgepress.pipeline.tune.student import ENOUGH_BITS, Student
from edgepress.pipeline.tune.teacher import mean_divergence, record
from edgepress.pipeline.tune.train import Lesson, Settings, train
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
WINDOW = 128  # tokens: a third cheaper a token than 512, and transfers no worse (docs/tuning.md)
JUDGING_TOKENS = 4096
SELECTION_TOKENS = 2048  # of each of two texts: the states of one training differ little from look to look
# The noise that training adds grows with the rate: what has lost little is only made worse by a rate that suits what lost much.
RATE, LOSS_OF_A_RATE = 3e-3, 75  # docs/tuning.md
NOTHING = 1e-5  # nats: rounding in the sums
# KL divergence in nats that bfloat16 may add to the original's own predictions and still teach.
NOISE = 0.002


def tune(source: Artifact, out: Path, options: TuneOptions) -> JsonObject:
    """Write ``source`` tuned into ``out``, or as it is when that does not help; returns the facts for the manifest.

    Codes and zero points stay those of ``source``. Raises OptionError without an original of the same vocabulary, TextError
    for a text that is too short, ProofError when what was written is not what was trained.
    """
    if options.original is None:
        raise OptionError("tune needs the model as it was before it was quantized; give --original DIR")
    check_checkpoint(options.original, options.trust_remote_code)
    checkpoint, original = (Checkpoint(path, options.trust_remote_code) for path in (source.path, options.original))
    _check_original(checkpoint, original)
    source.copy_to(out)
    bits = {linear.bits for name in checkpoint.weights.matrices if (linear := checkpoint.weights.packed(name))}
    if not bits or min(bits) >= ENOUGH_BITS:
        why = f"weights of {min(bits)} bits lose too little to win back" if bits else "nothing is quantized"
        log.info("tune: left as it is, %s", why)
        return {"accepted": False, "why": why}
    if options.calibration == SELF and options.calibration_tokens is None:
        options = replace(options, calibration_tokens=options.own_tokens(original.meta_model().num_parameters()))
    options = with_text(options, original.path)
    with _scratch(source, out, options) as scratch:
        return _tune(checkpoint, original, out, options, scratch)


def _check_original(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Raise OptionError unless both predict the same tokens."""
    sizes = [one.config.get_text_config().vocab_size for one in (checkpoint, original)]
    if sizes[0] != sizes[1] or checkpoint.tokenizer.to_str() != original.tokenizer.to_str():
        raise OptionError(
            f"{original.path} has another vocabulary than {checkpoint.path} ({sizes[1]} and {sizes[0]} tokens); give the "
            "checkpoint that it was made from as --original"
        )


@contextmanager
def _scratch(source: Artifact, out: Path, options: TuneOptions) -> Iterator[Path]:
    """A folder beside ``out`` for exactly this work, kept with what an interrupted training can be resumed from."""
    assert options.original is not None
    top = out.with_name(f"{out.name.removesuffix('.partial')}.tuning")
    ingredients = [repr(options), source.identity(), Artifact.load(options.original).identity()]
    ingredients += [sha256(path) for path in (options.calibration, options.other_text)]
    folder = top / hashlib.sha256(repr(ingredients).encode()).hexdigest()[:16]
    if not folder.is_dir():
        remove(top)  # of another training
        folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException as error:
        begun = (folder / _STATE).is_file() or any(folder.glob("*.logs"))  # the original's predictions took their time, too
        if isinstance(error, EdgepressError) or not begun:
            remove(top)
        raise
    remove(top)


_STATE = "training.pt"


def _tune(checkpoint: Checkpoint, original: Checkpoint, out: Path, options: TuneOptions, scratch: Path) -> JsonObject:
    texts = healing_sets(original.path, options, WINDOW)
    sets = {
        "selection": _beginning(texts.selection, SELECTION_TOKENS),
        "other_selection": _beginning(texts.other_selection, SELECTION_TOKENS),
        "judging": _beginning(texts.judging, JUDGING_TOKENS), "other": texts.other,
    }  # fmt: skip
    # What is more than enough to judge by teaches.
    fitted = [*texts.fit, *texts.selection[len(sets["selection"]) :], *texts.judging[len(sets["judging"]) :]]
    teacher = original.model().to(training_device())
    bfloat16 = _precision(teacher, texts.judging[0], scratch / "bfloat16.json")
    lessons = {name: Lesson(windows, record(teacher, windows, scratch / name)) for name, windows in sets.items()}
    with torch.autocast(teacher.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        fit = Lesson(fitted, record(teacher, fitted, scratch / "fit"))
    del teacher
    release_memory()
    student = Student(checkpoint)
    numbers = sum(parameter.numel() for _, parameter in student.trained())
    before = _judge(student, lessons)
    if before[0] <= NOTHING:
        log.info("tune: left as it is, nothing was lost")
        return {"accepted": False, "why": "nothing was lost"}
    log.info("tune: %d numbers to train, scales, norms and biases; no integer moves", numbers)
    rate = options.tune_rate or min(RATE, before[0] / LOSS_OF_A_RATE)
    settings = Settings(rate, options.tune_tokens, options.minutes, bfloat16)
    selection = [lessons["selection"], lessons["other_selection"]]
    training = train(student, fit, selection, settings, scratch / _STATE)
    student.round_scales()  # what is judged is what ships
    after = _judge(student, lessons)
    accepted = all(new < old for old, new in zip(before, after, strict=True))
    shown = f"held-out {before[0]:.3g} -> {after[0]:.3g} and other {before[1]:.3g} -> {after[1]:.3g}"
    if accepted:
        student.model.to("cpu")  # the proof compares sums, and a GPU adds in another order
        _write(checkpoint, student, out, texts.judging[0])
        log.info("tune: accepted; KL divergence of %s text", shown)
    else:
        log.warning(
            "warning: tuning did not help both kinds of text (KL divergence of %s); the checkpoint stays as it was (--calibration "
            "takes more text, of the kind that this model is meant for)", shown,
        )  # fmt: skip
    tokens = training.steps * training.batch_tokens
    names = ("held_out_kl", "other_kl")
    figures = {name: [round(value, 6) for value in pair] for name, *pair in zip(names, before, after, strict=True)}
    return {
        "accepted": accepted, "numbers": numbers, "matrices": len(student.matrices), "steps": training.steps, "tokens": tokens,
        "bfloat16": bfloat16, "training_kl": training.first_and_last(), **figures,
        "calibration": {"sha256": sha256(options.calibration), "other_text_sha256": sha256(options.other_text)}
        | {name: sum(map(len, windows)) for name, windows in {"fit": fitted, **sets}.items()},
    }  # fmt: skip


def _beginning(windows: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """As many windows as ``tokens`` hold, at least one."""
    return windows[: max(1, tokens // len(windows[0]))]


def _precision(teacher: PreTrainedModel, window: np.ndarray, kept: Path) -> bool:
    """Whether to multiply in bfloat16: found out once for an interrupted training, of which all is in one type."""
    if not kept.is_file():
        write_json(kept, {"bfloat16": _bfloat16_serves(teacher, window)})
    return bool(read_json(kept)["bfloat16"])


def _bfloat16_serves(teacher: PreTrainedModel, window: np.ndarray) -> bool:
    """Whether the processor multiplies faster in bfloat16, and the original's predictions stay what they are."""
    if not (torch.cuda.is_bf16_supported(including_emulation=False) if teacher.device.type == "cuda" else prefers_bfloat16()):
        return False
    exact = torch.from_numpy(logits_of(teacher, window))
    with torch.autocast(teacher.device.type, dtype=torch.bfloat16):
        rough = torch.from_numpy(logits_of(teacher, window))
    return float(divergences(exact, rough).mean()) <= NOISE


def _judge(student: Student, lessons: dict[str, Lesson]) -> list[float]:
    """Divergence on the two texts that neither taught nor selected, in float32."""
    return [mean_divergence(student.model, lessons[n].windows, lessons[n].predictions) for n in ("judging", "other")]


def _write(checkpoint: Checkpoint, student: Student, out: Path, window: np.ndarray) -> None:
    """Replace scales and float parameters in ``out``, and prove it. Raises ProofError."""
    packed.save(student.packed(), out)
    replace_tensors(out, student.floats(), dtype=torch.float32)  # bfloat16 would round most of the change away
    written = Checkpoint(out, checkpoint.trust_remote_code)
    for name in checkpoint.weights.matrices:
        former, present = checkpoint.weights.packed(name), written.weights.packed(name)
        assert former is not None
        if present is None or not np.array_equal(former.codes, present.codes) or not _equal(former.zeros, present.zeros):
            raise ProofError(f"the codes of {name} changed while its scales were tuned, so nothing was written; report this")
    if not np.allclose(logits_of(written.model(), window), logits_of(student.model, window), rtol=1e-4, atol=1e-4):
        raise ProofError("the tuned checkpoint does not compute what was trained, so nothing was written; report this")


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
