"""The calibration text of ``--calibration self``: written once for a model, a seed and a length, then kept in the cache folder."""

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
from edgepress.pipeline.artifact import RECORDS
from edgepress.pipeline.checkpoint.admission import check_checkpoint
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.errors import OptionError, OutputError, TextError
from edgepress.pipeline.fetch import cache_folder
from edgepress.pipeline.files import MANIFEST, is_sensitivity, sha256
from edgepress.pipeline.machine import training_device
from edgepress.pipeline.options import (
    PRUNE_TOKENS,
    SELF,
    HealOptions,
    NarrowOptions,
    PruneOptions,
    QuantizeOptions,
    SensitivityOptions,
    TuneOptions,
    sampler,
)
from edgepress.pipeline.text.windows import IDS, load_tokenizer, read_ids

log = logging.getLogger("edgepress")
Calibrated = TypeVar("Calibrated", PruneOptions, HealOptions, NarrowOptions, QuantizeOptions, TuneOptions, SensitivityOptions)
# Files of a checkpoint that may decide what it writes: weights, configs, all that a tokenizer is made from, chat templates, code.
_DECISIVE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
# Files in which stages record what they did.
_RECORDS = {MANIFEST, *RECORDS}


def with_text(options: Calibrated, model: Path) -> Calibrated:
    """The options with a file for ``self``: token ids that ``options.calibration_model`` wrote, or else ``model`` itself.

    Raises OptionError for a calibration model with another tokenizer, OutputError when no folder can be written.
    """
    if options.calibration != SELF:
        return options
    writer = options.calibration_model or model
    if options.calibration_model is not None:
        check_checkpoint(writer, options.trust_remote_code)
        if load_tokenizer(writer).get_vocab() != load_tokenizer(model).get_vocab():
            raise OptionError(f"{writer} has another tokenizer than {model}; give the model that it was made from")
    tokens = (options.calibration_tokens or PRUNE_TOKENS) + options.calibration_skip
    seed = options.calibration_seed if isinstance(options, QuantizeOptions) else None
    file = own_text(Checkpoint(writer, options.trust_remote_code), tokens, seed or 0)
    return replace(options, calibration=file, calibration_model=None)


def own_text(checkpoint: Checkpoint, tokens: int, seed: int = 0) -> Path:
    """The file with ``tokens`` ids that a checkpoint wrote, there already or written now; a damaged one is written anew.

    Where the cache folder cannot be written, it lies in one that ends with this process. Raises OutputError where neither can.
    """
    name = f"{_key(checkpoint.path, tokens, seed)}{IDS}"
    folders = [*_cache(), *_unkept]
    if there := next((folder / name for folder in folders if _holds(folder / name, tokens)), None):
        return there
    from edgepress.pipeline.own_text.sampler import sample

    ids = sample(checkpoint, tokens, seed)
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
    content = {file.name: sha256(file) for file in sorted(files) if not is_sensitivity(file)}
    device = training_device().type
    decisive = [content, tokens, seed, sampler(), str(dtype()), *([device] if device != "cpu" else [])]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


def _holds(file: Path, tokens: int) -> bool:
    """Whether a file is there and whole."""
    with suppress(TextError, OSError):
        return file.is_file() and len(read_ids(file)) == tokens
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
