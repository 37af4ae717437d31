"""GGUF files, llama.cpp's format, as plain Hugging Face checkpoints: transformers dequantizes, names and tokenizer included."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal
from unittest.mock import patch

import numpy as np
import torch
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.load import quiet
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.checkpoint.weight_file import file_for
from edgepress.pipeline.errors import EdgepressError, InputError, ModelError, OptionError
from edgepress.pipeline.files import JsonObject
from edgepress.pipeline.machine import large_blocks_given_back, too_large
from edgepress.pipeline.options import ImportOptions
from edgepress.pipeline.progress import progress
from edgepress.pipeline.registry import require
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger("edgepress")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Two quantizations of one matrix differ by a few per cent of its length; two matrices by about 1.4 times.
_SAME_MATRIX = 0.2
_TURN = threading.Lock()  # of the thread that imports: names of transformers and gguf are replaced meanwhile, for all
_VISION = frozenset({"clip", "mmproj"})  # what a multi-modal model keeps in a file of its own


def import_gguf(source: Artifact, out: Path, options: ImportOptions) -> JsonObject:
    """Write the GGUF file ``source.path`` as a float32 checkpoint into ``out``; returns the facts for the manifest.

    float32, since 4-bit weights times a float16 scale need more digits than bfloat16 has. With ``options.keep_codes`` the matrices
    of Q4_0 and Q8_0 go into packed.safetensors instead, their codes and scales as they are. Raises InputError for a file that is
    damaged or split, ModelError for an architecture that transformers cannot convert, OptionError for codes that cannot be kept.
    """
    require("gguf")
    with _TURN:
        reader = _read(source.path)
        with _parsed_once(source.path, reader):
            kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
            return _import(source.path, kinds, sum(int(tensor.n_elements) for tensor in reader.tensors), out, options)


def _import(file: Path, kinds: Counter[str], weights: int, out: Path, options: ImportOptions) -> JsonObject:
    try:
        # its bar is drawn wherever stderr goes, and cannot be switched off
        with quiet(), patch.object(modeling_gguf_pytorch_utils, "tqdm", _bar), _dequantized(weights), _alone(file) as folder:
            given = {"gguf_file": file.name, "trust_remote_code": False}
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
            tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except EdgepressError:
        raise
    except Exception as error:  # the converters raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot convert {file.name} ({reason}); give the original checkpoint") from error
    tied = _tie(loaded)
    model = _plain(loaded)
    kept = _kept(file, model, kinds) if options.keep_codes else {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in kept}
    if kept and model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not _is_head(model, name)}
    with quiet():
        # what goes into one file is copied into memory before
        model.save_pretrained(out, state_dict=state if kept else None, **({"max_shard_size": "1GB"} if too_large(weights) else {}))
        tokenizer.save_pretrained(out)
    if kept:
        packed.save({name: linear for name, (_, linear) in kept.items()}, out)
    coarse = sorted(kind for kind in kinds if kind not in _FLOATS)
    if coarse:
        log.warning(
            "warning: %s is quantized already (%s): what that cost was lost before edgepress begins", file.name, ", ".join(coarse)
        )
    return {
        "architecture": model.config.model_type,
        "file_bytes": file.stat().st_size,
        "types": dict(sorted(kinds.items())),
        "quantized_types": coarse,
        "parameters": model.num_parameters(),
        "tied_from_two_matrices": tied,
        "kept_codes": dict(sorted(Counter(kind for kind, _ in kept.values()).items())),
        "chat_template": tokenizer.chat_template is not None,
    }


def _kept(file: Path, model: PreTrainedModel, kinds: Counter[str]) -> dict[str, tuple[str, PackedLinear]]:
    """The matrices whose codes are kept. Raises OptionError where there is none."""
    from edgepress.pipeline.checkpoint.importers.gguf_codes import BITS, kept_codes

    kept = kept_codes(file, model)
    if not kept:
        found = ", ".join(sorted(kind for kind in kinds if kind not in ("F32", *BITS))) or "float"
        raise OptionError(
            f"{file.name} holds no {' or '.join(BITS)} matrix of the model, only {found}, which no operator carries as it is; "
            "leave --keep-codes out"
        )
    others = sorted(kind for kind in kinds if kind not in (*_FLOATS, *BITS))
    rest = f"; those of {', '.join(others)} are dequantized, because no operator carries them as they are" if others else ""
    log.info("import: %d matrices keep the codes and scales of the file%s", len(kept), rest)
    return kept


def _is_head(model: PreTrainedModel, name: str) -> bool:
    head = model.get_output_embeddings()
    return head is not None and model.get_submodule(name.rpartition(".")[0]) is head


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder that holds the file alone: transformers would read the configs, adapters and code that lie beside it, too."""
    with tempfile.TemporaryDirectory(prefix="edgepress-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _bar(tensors: list[object], desc: str) -> Iterator[object]:
    return progress(tensors, "import", "tensor")


@contextmanager
def _dequantized(weights: int) -> Iterator[None]:
    """Within the context what transformers dequantizes lies in a file, where so many weights do not fit into memory."""
    if (file := file_for(weights)) is None:
        yield
        return

    def copy(values: np.ndarray) -> np.ndarray:
        held = file.empty(values.shape)  # numpy's array may be one that torch would warn of
        array: np.ndarray = held.numpy()
        np.copyto(array, values)
        file.release([held])
        return array

    # the one copy that it makes of each tensor, once that is as the model has it
    with patch.object(modeling_gguf_pytorch_utils, "np", SimpleNamespace(**vars(np) | {"copy": copy})), large_blocks_given_back():
        yield


@contextmanager
def _parsed_once(file: Path, reader: GGUFReader) -> Iterator[None]:
    """Within the context whoever opens the file gets this reader: of a large vocabulary it makes a million objects, five times."""
    import gguf

    real = gguf.GGUFReader

    def opened(path: str | Path, mode: Literal["r", "r+", "c"] = "r") -> GGUFReader:
        return reader if mode == "r" and Path(path).samefile(file) else real(path, mode)

    with patch.object(gguf, "GGUFReader", opened):
        yield


def _read(file: Path) -> GGUFReader:
    """The file's reader. Raises InputError for what is no complete GGUF of a language model."""
    from gguf import GGUFReader

    class Plain(GGUFReader):
        """Cuts its million strings from a plain array, which takes half the time that cutting them from a numpy.memmap takes."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise InputError(
            f"{file.name} is one part of a split GGUF; join the parts with llama-gguf-split --merge and give the whole"
        )
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file; give one, or a folder with config.json")
    try:
        reader = Plain(file)
        ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
        architecture = reader.get_field("general.architecture")
        name = "" if architecture is None else str(architecture.contents())
    except Exception as error:  # the reader maps the file and trusts its numbers
        raise InputError(f"{file} is damaged or cut short; replace it") from error
    if not ends or max(ends) > file.stat().st_size:
        raise InputError(f"{file} is damaged or cut short; replace it")
    if name in _VISION:
        raise ModelError(f"{file.name} is the vision part of a model; give the GGUF of its language model")
    return reader


def _tie(model: PreTrainedModel) -> bool:
    """Tie head and embedding that are one matrix stored twice, at two precisions; the head's values, which are finer, stay."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return False
    rows = slice(None, None, max(1, len(head.weight) // 4096))
    one, other = (weight[rows].detach().numpy() for weight in (head.weight, embedding.weight))
    if np.linalg.norm(one - other) > _SAME_MATRIX * np.linalg.norm(one):
        return False
    model.config.tie_word_embeddings = True
    embedding.weight = head.weight
    log.info("import: embedding and head are one matrix at two precisions, tied on the head's")
    return True


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model built from its config alone: save_pretrained refuses one whose config tells of a GGUF."""
    config, state, generation = model.config, model.state_dict(), model.generation_config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = generation
    return plain.eval()
