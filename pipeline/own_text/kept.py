"""The texts of ``--calibration self`` and ``mixed``: made once for a model, a seed and a length, then kept in the cache folder."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.pipeline.artifact import RECORDS
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import ModelError, OptionError, OutputError, TextError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import MANIFEST, is_measurement, sha256
from edgepress.pipeline.machine import available_memory, release_memory, training_device
from edgepress.pipeline.metrics.readable import readable
from edgepress.pipeline.metrics.torch_scores import mean_loss
from edgepress.pipeline.options import (
    MIXED,
    MIXTURE,
    OWN_TOKENS,
    PRUNE_TOKENS,
    WRITTEN,
    HealOptions,
    NarrowOptions,
    PruneOptions,
    QuantizeOptions,
    SensitivityOptions,
    TuneOptions,
    sampler,
)
from edgepress.pipeline.text.windows import IDS, ids_of, load_tokenizer, read_ids, text_windows

log = logging.getLogger("edgepress")
Calibrated = TypeVar("Calibrated", PruneOptions, HealOptions, NarrowOptions, QuantizeOptions, TuneOptions, SensitivityOptions)
TURN = 256  # tokens of each part of a mixed text, in turn: a row of the sampler
READ_TOKENS = 1024  # that show whether a model reads a text
_SHIPPED = "shipped-"  # begins the name of a file that no model wrote anything for
# Files of a checkpoint that may decide what it writes: weights, configs, all that a tokenizer is made from, chat templates, code.
_DECISIVE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
# Files in which stages record what they did.
_RECORDS = {MANIFEST, *RECORDS}


def with_text(options: Calibrated, model: Path, sparing: bool = False, shipped: bool = False) -> Calibrated:
    """The options with a file for ``self``: token ids that ``options.calibration_model`` wrote, or else ``model`` itself.

    For ``mixed`` see ``mixed_text``; of that what is ``shipped`` alone.
    Raises OptionError for a calibration model with another tokenizer, OutputError when no folder can be written, and where
    ``sparing`` ModelError for a model that does not fit into memory.
    """
    if options.calibration not in WRITTEN:
        return options
    writer = options.calibration_model or model
    if options.calibration_model is not None:
        check_checkpoint(writer, options.trust_remote_code)
        if load_tokenizer(writer).get_vocab() != load_tokenizer(model).get_vocab():
            raise OptionError(f"{writer} has another tokenizer than {model}; give the model that it was made from")
    checkpoint = Checkpoint(writer, options.trust_remote_code)
    seed = options.calibration_seed if isinstance(options, QuantizeOptions) else None
    if options.calibration == MIXED:
        # all other stages are judged by technical prose, which may not teach what it judges
        free = isinstance(options, QuantizeOptions | SensitivityOptions)
        file = mixed_text(checkpoint, seed or 0, own=not shipped, technical=free)
    else:
        tokens = (options.calibration_tokens or PRUNE_TOKENS) + options.calibration_skip
        file = own_text(checkpoint, tokens, seed or 0, sparing)
    return replace(options, calibration=file, calibration_model=None)


def first_read(calibration: Path) -> Path:
    """The text that a calibration text begins with, by the name that a message gives it: of ``mixed`` the shipped prose."""
    return CALIBRATION_TEXT if calibration == MIXED else calibration


def is_written(file: Path) -> bool:
    """Whether a file that calibrates has text which a model wrote."""
    return file.name.endswith(IDS) and not file.name.startswith(_SHIPPED)


def read_of_mixed(file: Path) -> str:
    """What a manifest calls the file that calibrates in place of ``mixed``."""
    if is_written(file):
        return str(MIXED)
    return CALIBRATION_TEXT.name if file == CALIBRATION_TEXT else f"{CALIBRATION_TEXT.name} and {OTHER_TEXT.name}"


def mixed_text(checkpoint: Checkpoint, seed: int = 0, own: bool = True, technical: bool = True) -> Path:
    """The shipped prose, ``OWN_TOKENS`` ids of the model's own and the shipped technical prose, by turns of ``TURN``.

    Without what is not asked for; without the second where the model takes more than half of the memory that is free, or makes no
    text, without the third where it does not read that. Raises OutputError when no folder can be written.

    One kind of text teaches GPTQ that kind: what it wins on prose it half loses on code, and the other way round. What each matrix
    costs is known no better with the model's own (docs/calibration.md).
    """
    written = None
    try:
        written = own_text(checkpoint, OWN_TOKENS, seed, sparing=True) if own else None
    except ModelError as error:
        log.warning("warning: the shipped texts alone calibrate: %s", error)
    if written is None and not technical:
        return CALIBRATION_TEXT
    model = _key(checkpoint.path, OWN_TOKENS, seed)
    decisive = [model, written is None, technical, MIXTURE, TURN, READ_TOKENS, *map(sha256, (CALIBRATION_TEXT, OTHER_TEXT))]
    name = f"{_SHIPPED if written is None else ''}{hashlib.sha256(repr(decisive).encode()).hexdigest()[:32]}{IDS}"
    if there := _found(name):
        return there
    prose = _first_ids(CALIBRATION_TEXT, checkpoint)
    parts = [prose] if written is None else [prose, read_ids(written)[: len(prose)]]
    if technical and _reads(checkpoint, OTHER_TEXT, model):
        parts.append(_first_ids(OTHER_TEXT, checkpoint))
    if len(parts) == 1:
        return CALIBRATION_TEXT
    turns = [part[first : first + TURN] for first in range(0, OWN_TOKENS, TURN) for part in parts]
    return _kept(name, np.concatenate(turns))


def _first_ids(text: Path, checkpoint: Checkpoint) -> np.ndarray:
    return np.array(ids_of(text, checkpoint.tokenizer, OWN_TOKENS), dtype=np.int64)[:OWN_TOKENS]


def _reads(checkpoint: Checkpoint, text: Path, model: str) -> bool:
    """Whether the model, by its ``_key``, can read a text; found out once in a process, for it takes all weights."""
    if (model, text) not in _read:
        _read[model, text] = False
        with suppress(ModelError, TextError):  # of other names than the modules have, or without rows for its tokens
            windows = text_windows(text, checkpoint.path, budget=READ_TOKENS, length=min(READ_TOKENS // 4, checkpoint.context))
            loss = mean_loss(checkpoint.offloaded_model(), windows)
            _read[model, text] = readable(loss, int(checkpoint.config.get_text_config().vocab_size))
    return _read[model, text]


def own_text(checkpoint: Checkpoint, tokens: int, seed: int = 0, sparing: bool = False) -> Path:
    """The file with ``tokens`` ids that a checkpoint wrote, there already or written now; a damaged one is written anew.

    Where the cache folder cannot be written, it lies in one that ends with this process. Raises OutputError where neither can,
    ModelError for logits that are not finite, and where ``sparing`` for a model of more than half of the memory that is free.
    """
    name = f"{_key(checkpoint.path, tokens, seed)}{IDS}"
    if there := _found(name, tokens):
        return there
    free, needed = available_memory(), 4 * checkpoint.meta_model().num_parameters()  # the sampler loads float32
    if sparing and free is not None and 2 * needed > free:
        size = f"{needed / 1e9:.1f} GB in float32, of {free / 1e9:.1f} GB that are free"
        raise ModelError(f"{checkpoint.path.name} would take {size}, and writes nothing")
    from edgepress.pipeline.own_text.sampler import sample

    ids = sample(checkpoint, tokens, seed)
    release_memory()  # of the model that wrote: its parts refer to one another
    return _kept(name, ids)


def _found(name: str, tokens: int | None = None) -> Path | None:
    """The file of that name, if it is there and whole; tokens: that it holds, if it is known."""
    return next((folder / name for folder in [*_cache(), *_unkept] if _holds(folder / name, tokens)), None)


def _kept(name: str, ids: np.ndarray) -> Path:
    """The file of that name with these ids, there already or written now."""
    if there := _found(name, len(ids)):
        return there
    try:
        return _write(_cache()[0] / name, ids)
    except (OSError, IndexError) as error:
        reason = error.strerror if isinstance(error, OSError) else "there is no home folder"
    try:
        file = _write(_temporary() / name, ids)
    except OSError as error:
        raise OutputError(
            f"cannot write the calibration text anywhere ({error.strerror}); let EDGEPRESS_CACHE name a folder to write in"
        ) from error
    log.info("calibration: the text is not kept in the cache folder (%s), and would be written again another time", reason)
    return file


def _cache() -> list[Path]:
    """The folder of the cache; none where nobody is at home."""
    with suppress(RuntimeError):
        return [cache_folder() / "own-text"]
    return []


_unkept: list[Path] = []
_read: dict[tuple[str, Path], bool] = {}


def _temporary() -> Path:
    """A folder that is removed when this process ends."""
    if not _unkept:
        folder = tempfile.mkdtemp(prefix="edgepress-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _unkept.append(Path(folder))
    return _unkept[0]


def _key(folder: Path, tokens: int, seed: int) -> str:
    """Hash of all that decides what is written."""
    from edgepress.pipeline.own_text.sampler import dtype

    files = {file for pattern in _DECISIVE for file in folder.glob(pattern) if file.name not in _RECORDS}
    content = {file.name: sha256(file) for file in sorted(files) if not is_measurement(file)}
    device = training_device()
    decisive = [content, tokens, seed, sampler(), str(dtype(device)), *([device.type] if device.type != "cpu" else [])]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _holds(file: Path, tokens: int | None) -> bool:
    """Whether a file is there and whole."""
    with suppress(TextError, OSError):
        return file.is_file() and tokens in (None, len(read_ids(file)))
    return False


def _write(file: Path, ids: np.ndarray) -> Path:
    """Written beside and renamed: whole or not there. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", suffix=IDS, delete=False) as part:
        try:
            np.savez_compressed(part, ids=ids.astype(np.int32))
            part.close()
            os.replace(part.name, file)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    return file
