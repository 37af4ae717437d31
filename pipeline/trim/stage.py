"""The trim stage: fewer rows of embedding and head, the tokenizer to match, every id renumbered, and the proof of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from edgepress.models import CALIBRATION_TEXT, OTHER_TEXT
from edgepress.models.pruned_config import with_size
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint.blocks import Blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.parts import parameters_left
from edgepress.pipeline.checkpoint.update import carry_files, replace_tensors
from edgepress.pipeline.errors import ModelError, ProofError, TextError
from edgepress.pipeline.files import JsonObject, folder_bytes, read_json, sha256, write_json
from edgepress.pipeline.machine import release_memory
from edgepress.pipeline.metrics.bits import bits_per_byte
from edgepress.pipeline.model_files import read_tokenizer_config
from edgepress.pipeline.options import TrimOptions
from edgepress.pipeline.text.pieces import Pieces
from edgepress.pipeline.text.reading import read_text
from edgepress.pipeline.text.tokenizer import resolved
from edgepress.pipeline.text.windows import beginning, check_ids, ids_of
from edgepress.pipeline.trim.choice import Wish, choose, scripts_of
from edgepress.pipeline.trim.token_ids import named_ids, renumbered
from tokenizers import Tokenizer
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")
TABLE = "former_ids.json"
# What knows a tokenizer otherwise than tokenizer.json: of the pieces that are gone, too.
_OTHER_FILES = (
    "genai_config.json", "vocabulary.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "tekken.json",
)  # fmt: skip
_JUDGED = 16_000  # characters of the text that judges


def trim(source: Artifact, out: Path, options: TrimOptions) -> JsonObject:
    """Write the checkpoint with the pieces that were chosen into ``out``; returns the manifest's facts.

    ``former_ids.json`` there lists the former id of each new one. Raises OptionError for a wish that cannot be met, ModelError for
    a tokenizer or an architecture that is not handled, ProofError where what was written differs in what stayed.
    """
    scripts_of(options.languages)  # what is not known is refused before anything is read
    checkpoint = Checkpoint(source.path, options.trust_remote_code)
    read = checkpoint.remarks("trim")
    rows, names = _vocabulary_tensors(checkpoint)
    pieces = Pieces(_tokenizer(checkpoint), rows)
    text = read_text(options.text, options.text_key)[:_JUDGED]
    judged = checkpoint.tokenizer.encode(text, add_special_tokens=False).ids
    check_ids([*beginning(checkpoint.tokenizer), *judged], checkpoint.tokenizer, rows, str(options.text))
    if len(judged) < 2:
        raise TextError(f"{options.text} is too short: {len(judged)} tokens; give a longer text")
    wish = _wish(checkpoint, pieces, options, rows)
    kept = choose(pieces, wish)
    smaller, former = pieces.reduced(kept)
    if len(former) == rows:
        raise ModelError(f"every one of its {rows:,} tokens is needed; there is nothing to trim")
    log.info("trim: %s of %s tokens stay", f"{len(former):,}", f"{rows:,}")
    model = checkpoint.model()
    before, window = bits_per_byte(model, checkpoint.tokenizer, text), _probe(checkpoint.tokenizer, text, former)
    truth = _computed(model, window)
    parameters = parameters_left(model, checkpoint.silent)
    del model
    release_memory()
    _write(checkpoint, out, smaller, former, names)
    trimmed = Checkpoint(out, options.trust_remote_code)
    _prove_tokenizer(
        checkpoint.tokenizer, trimmed.tokenizer, former, _texts(options) if wish.texts_stay else (), options.text_key, text
    )
    new = {number: place for place, number in enumerate(former)}
    model = trimmed.model()
    left = parameters_left(model, trimmed.silent)
    difference = _prove_logits(truth, _computed(model, np.array([new[i] for i in window])), former)
    after = bits_per_byte(model, trimmed.tokenizer, text)
    log.info(
        "trim: %.4g -> %.4g million parameters; bits a byte of %s %.4f -> %.4f (%+.1f %%), its tokens %+.1f %%",
        parameters / 1e6, left / 1e6, options.text.name, before.bits, after.bits,
        100 * (after.bits / before.bits - 1), 100 * (after.tokens / before.tokens - 1),
    )  # fmt: skip
    return read | {
        "vocabulary": [rows, len(former)],
        "scripts": sorted(wish.scripts),
        "former_ids": {"file": TABLE, "sha256": sha256(out / TABLE)},
        "parameters": [parameters, left],
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
        "bits_per_byte": [round(before.bits, 5), round(after.bits, 5)],
        "tokens": [before.tokens, after.tokens],
        "proof": {"tokens": len(window), "largest_logit_difference": difference},
    }


def _tokenizer(checkpoint: Checkpoint) -> JsonObject:
    """The content of tokenizer.json, as transformers makes it of the folder."""
    known = resolved(checkpoint.path)
    content: JsonObject = read_json(checkpoint.path / "tokenizer.json") if known is None else json.loads(known.content)
    return content


def _vocabulary_tensors(checkpoint: Checkpoint) -> tuple[int, list[str]]:
    """Rows of the embedding, and the parameters that have as many. Raises ModelError for one that is neither embedding nor head."""
    model = checkpoint.meta_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{checkpoint.config.model_type} has no head that writes tokens; there is nothing to trim")
    known = [parameter for module in (embedding, head) for parameter in module.parameters(recurse=False)]
    rows, names = embedding.num_embeddings, []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(parameter is other for other in known):
            names.append(name)
        elif parameter.shape and parameter.shape[0] == rows:
            raise ModelError(f"{name} has a row for each token, too, which trim does not know; keep the whole vocabulary")
    return rows, names


def _texts(options: TrimOptions) -> tuple[Path, ...]:
    """Texts that say what is used: the given ones, else two that are shipped."""
    return options.keep_text or (CALIBRATION_TEXT, OTHER_TEXT)


def _wish(checkpoint: Checkpoint, pieces: Pieces, options: TrimOptions, rows: int) -> Wish:
    """What the options ask for, with the counts of the texts and the ids that the model's files name."""
    counts = np.zeros(rows, dtype=np.int64)
    for text in _texts(options):
        ids = ids_of(text, checkpoint.tokenizer, None, options.text_key)
        check_ids(ids, checkpoint.tokenizer, rows, str(text))
        counts += np.bincount(ids, minlength=rows)
    files = (checkpoint.path / name for name in ("generation_config.json", "tokenizer_config.json"))
    contents = [checkpoint.raw_config, *(read_json(file) for file in files if file.is_file())]
    must = {number for content in contents for number in named_ids(content) if number < rows}
    must |= set(beginning(checkpoint.tokenizer)) | _named_by_text(checkpoint.path, pieces)
    return Wish(
        counts,
        frozenset(must & pieces.names.keys()),
        options.keep_tokens,
        texts_stay=bool(options.keep_text),
        scripts=scripts_of(options.languages),
    )


def _named_by_text(folder: Path, pieces: Pieces) -> set[int]:
    """Added tokens that the tokenizer's settings or a chat template name: a padding token may be called reserved."""
    settings = read_tokenizer_config(folder)
    texts = [json.dumps({k: v for k, v in settings.items() if k != "added_tokens_decoder"}, ensure_ascii=False)]
    files = [folder / "special_tokens_map.json", *folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    texts += [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return {number for name, number in pieces.added.items() if any(name in text for text in texts)}


def _write(checkpoint: Checkpoint, out: Path, tokenizer: JsonObject, former: list[int], names: list[str]) -> None:
    """The checkpoint with the rows of ``former`` alone."""
    new = {number: place for place, number in enumerate(former)}
    checkpoint.rewrite(out, lambda name: name)
    carry_files(checkpoint.path, out, checkpoint.trust_remote_code)
    for file in (*(out / name for name in _OTHER_FILES), *out.glob("*.model")):
        file.unlink(missing_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for file in out.glob("*_config.json"):
        write_json(file, renumbered(read_json(file), new))
    write_json(out / "config.json", with_size(renumbered(checkpoint.raw_config, new), "vocab_size", len(former)))
    write_json(out / TABLE, {"former_ids": former})
    kept = torch.tensor(former)
    stored = ((name, _tensor(checkpoint, name)) for name in names)
    replace_tensors(out, {name: tensor[kept] for name, tensor in stored if tensor is not None})


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """Some files omit the base model's prefix; a tied head is in none."""
    tensor = checkpoint.tensor(name)
    return checkpoint.tensor(name.split(".", 1)[-1]) if tensor is None else tensor


def _computed(model: PreTrainedModel, window: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the last block, and the logits, of a window of ids (tokens,)."""
    blocks, ids = Blocks(model), torch.from_numpy(window)[None]
    with torch.inference_mode():
        return blocks.states(ids, [len(blocks)])[len(blocks)], model(input_ids=ids, use_cache=False).logits[0]


def _probe(tokenizer: Tokenizer, text: str, former: list[int]) -> np.ndarray:
    """Ids of the text that stay, as many as a proof needs."""
    kept = set(former)
    ids = [
        number for number in [*beginning(tokenizer), *tokenizer.encode(text[:4096], add_special_tokens=False).ids] if number in kept
    ]
    return np.array(ids[:128] or former[:8], dtype=np.int64)


def _prove_logits(truth: tuple[torch.Tensor, torch.Tensor], found: tuple[torch.Tensor, torch.Tensor], former: list[int]) -> float:
    """The largest difference of a logit. Raises ProofError unless states are equal, and logits up to the order of additions.

    A matrix product of fewer rows may add in another order; the rows themselves are copied.
    """
    if not torch.equal(truth[0], found[0]):
        raise ProofError("what leaves the last block differs from the original's on tokens that stayed, so nothing was written")
    wanted = truth[1][:, former]
    difference = float((wanted - found[1]).abs().max())
    if difference > 1e-5 * float(wanted.std() + wanted.abs().max()):
        raise ProofError(
            f"the logits of tokens that stayed differ from the original's by up to {difference:.3g}, so nothing was written; "
            "its head depends on the size of the vocabulary"
        )
    return difference


def _prove_tokenizer(before: Tokenizer, after: Tokenizer, former: list[int], texts: tuple[Path, ...], key: str, other: str) -> None:
    """Raise ProofError unless ids of the kept texts map one to one, and any text decodes to what it did."""
    for text in texts:
        ids, wanted = ids_of(text, after, None, key), ids_of(text, before, None, key)
        if [former[number] for number in ids] != wanted:
            raise ProofError(
                f"{text} is no longer encoded as it was, though all its tokens stayed; its tokenizer cannot be trimmed"
            )
    if max(after.get_vocab(with_added_tokens=True).values()) >= len(former):
        raise ProofError("transformers adds a token that was trimmed; name it in --keep-text, so that it stays")
    wanted_text = before.decode(before.encode(other, add_special_tokens=False).ids)
    if after.decode(after.encode(other, add_special_tokens=False).ids) != wanted_text:
        raise ProofError("a text decodes to something else than before; the tokenizer cannot be trimmed")
