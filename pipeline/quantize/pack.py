"""The work of the quantize stage: what the quantizer chose is stored as PackedLinear and ships unchanged."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.checkpoint import packed
from edgepress.pipeline.checkpoint.blocks import decoder_blocks
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.packed import FEW_BITS, LEAST_ROWS, MOST_PARTS, PackedLinear, with_few_bits
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.errors import OptionError, ProofError
from edgepress.pipeline.files import JsonObject, folder_bytes, write_json
from edgepress.pipeline.methods import METHODS
from edgepress.pipeline.options import QuantizeOptions, rows_of
from edgepress.pipeline.quantize.head import Head, group_of
from edgepress.pipeline.quantize.job import QuantizeJob, chosen_rows
from edgepress.pipeline.quantize.plan import Read, plan, with_full_names
from edgepress.pipeline.quantize.proof import prove_errors, prove_written
from edgepress.pipeline.quantize.rtn import round_to_nearest
from edgepress.pipeline.registry import load
from transformers import PreTrainedModel

log = logging.getLogger("edgepress")


def quantize_checkpoint(source: Artifact, out: Path, options: QuantizeOptions, scratch: Path) -> JsonObject:
    """Write the checkpoint with its block matrices packed into ``out``; returns the facts for the manifest.

    scratch: see QuantizeJob. Raises what ``plan`` and the quantizer raise, and ProofError when the result is wrong.
    """
    checkpoint, run = Checkpoint(source.path, options.trust_remote_code), METHODS[options.method].run
    carry_files(source.path, out, options.trust_remote_code)
    write_json(out / "config.json", checkpoint.raw_config)
    read = checkpoint.remarks("quantize")
    kept = {name: linear for name in checkpoint.weights.matrices if (linear := checkpoint.weights.packed(name))}
    if run is None:
        checkpoint.rewrite(out, lambda name: name)
        packed.save(kept, out)
        return read | {"bytes": [folder_bytes(source.path), folder_bytes(out)], "linears": len(kept), "kept_codes": len(kept)}

    model = checkpoint.meta_model()
    with with_full_names(checkpoint, model, out) as named:
        job, seen = plan(named, model, options, scratch)
        ends = _ends(named, model, options)
        rare = _rare_rows(ends, model, options)
        if ends.head in ends.forms and options.group > 0:
            of_head, group = ends.forms[ends.head]
            job = replace(job, head=(ends.head, FEW_BITS if rare else of_head, group), head_rows=rare)
        linears = load(run)(job) if job.linears else {}
        if missing := sorted(set(job.linears) - set(linears)):
            raise ProofError(f"the quantizer did not return {missing[0]} and {len(missing) - 1} more; nothing was written")
        errors = prove_errors(job, linears)
        linears |= kept
        few = linears.pop(ends.head, None) if rare else None
        linears |= {
            name: _rounded(named, name, *form, options.group <= 0) for name, form in ends.forms.items() if name not in linears
        }
        if rare:
            group = ends.forms[ends.head][1]
            few = few or _rounded(named, ends.head, FEW_BITS, group, options.group <= 0, rare)
            linears[ends.head] = with_few_bits(linears[ends.head], few, rare)
        packed.save(linears, out)
        # A tied model may store its head a second time; it would outlive the packed one.
        tied = model.config.tie_word_embeddings and ends.head in linears
        dropped = set(linears) | ({"lm_head"} if tied else set())
        named.rewrite(out, lambda name: None if name.removesuffix(".weight") in dropped else name)
    prove_written(linears, out)
    bits = [x.bits for name, x in linears.items() if name not in ends.names]
    return read | {
        "linears": len(linears),
        "kept_codes": len(kept),
        "head": {name: linears[name].bits for name in ends.names if name in linears} or "float",
        **({"rare_rows": [sum(rows.stop - rows.start for rows in rare), linears[ends.head].shape[0]]} if rare else {}),
        "bits": {str(n): bits.count(n) for n in sorted(set(bits))},
        "kept_float": _kept_float(model, {*linears, *named.spared(job.untouched)}),
        "calibration": _calibration(seen, options),
        "calibration_positions": sum(map(len, seen.windows)),
        **_sizes(linears),
        **_other_blocks(linears, job),
        "relative_error": errors,
        "bytes": [folder_bytes(source.path), folder_bytes(out)],
    }


@dataclass(frozen=True)
class _Ends:
    """Embedding and output head: one matrix under the embedding's name where they are tied.

    names: of both. forms: bits and group size of those that are quantized, by name. head: its name.
    """

    names: tuple[str, ...]
    forms: dict[str, tuple[int, int]]
    head: str


def _ends(checkpoint: Checkpoint, model: PreTrainedModel, options: QuantizeOptions) -> _Ends:
    """A group size must divide the hidden size here, for the embedding is gathered from the same blocks."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    requested = {embedding: options.embedding_bits or options.head_bits}
    if model.config.tie_word_embeddings:
        head = embedding
    else:
        requested[head] = options.head_bits
    forms: dict[str, tuple[int, int]] = {}
    for name, bits in requested.items():
        if name in checkpoint.weights.matrices or bits == 16:  # the former have codes, which stay as they are
            continue
        width = checkpoint.shapes.get(f"{name}.weight", (0, 0))[1]
        group = group_of(width, options.group if options.group > 0 else 128)
        if group is None:
            log.info("quantize: %s stays float (no group size divides its width)", name)
            continue
        forms[name] = bits, group
    return _Ends(tuple(requested), forms, head)


def _rare_rows(ends: _Ends, model: PreTrainedModel, options: QuantizeOptions) -> tuple[slice, ...]:
    """The rows of the head that get few bits. Raises OptionError where it has no such rows, or no codes of its own."""
    rare, vocabulary = tuple(rows_of(options.rare_rows)), model.get_output_embeddings().weight.shape[0]
    if rare and ends.head not in ends.forms:
        raise OptionError("--rare-rows is for a head that is quantized here, and this one keeps its weights; leave it out")
    if rare and rare[-1].stop > vocabulary:
        raise OptionError(f"--rare-rows {options.rare_rows[-1]} ends beyond the {vocabulary} rows of the head; give less")
    parts = Head(8, options.rare_rows).parts(vocabulary)
    if rare and (len(parts) > MOST_PARTS or len(parts) < 2 or any(rows.stop - rows.start < LEAST_ROWS for rows, _ in parts)):
        raise OptionError(
            f"--rare-rows divides the {vocabulary} rows of the head into {len(parts)} parts; give ranges that make 2 to "
            f"{MOST_PARTS} of at least {LEAST_ROWS} rows each"
        )
    return rare


def _rounded(checkpoint: Checkpoint, name: str, bits: int, group: int, by_row: bool, rows: Sequence[slice] = ()) -> PackedLinear:
    """Embedding or head, rounded to nearest. by_row: one scale a row, stored in groups. rows: only these of it."""
    weight = checkpoint.tensor(f"{name}.weight")
    assert weight is not None
    weight = chosen_rows(weight, rows)
    linear = round_to_nearest(name, weight, bits, -1 if by_row else group, symmetric=bits == 8)
    return linear if linear.group_size == group else linear.in_blocks(group)


def _sizes(linears: dict[str, PackedLinear]) -> JsonObject:
    """What a weight costs, the blocks in which weights share a scale, and by how many columns each matrix was padded."""
    weights = sum(x.shape[0] * x.shape[1] for x in linears.values())
    return {
        "bits_per_weight": round(8 * sum(x.nbytes for x in linears.values()) / weights, 3),
        "blocks": sorted({x.group_size for x in linears.values()}),  # -1 as group size becomes repeated scales in such blocks
        "padded": {
            n: x.groups * x.group_size - x.shape[1] for n, x in linears.items() if not x.codebook and x.shape[1] % x.group_size
        },
    }


def _other_blocks(linears: dict[str, PackedLinear], job: QuantizeJob) -> JsonObject:
    """Matrices whose scales are not for as many weights each as was asked for, by the length of their blocks; said in one line."""
    other: dict[str, list[str]] = {}
    for name, linear in linears.items():
        if linear.group_size != (asked := job.format(name)[1]) and asked > 0:
            other.setdefault(str(linear.group_size), []).append(name)
    for block, names in other.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        width, asked = linears[names[0]].shape[1], job.format(names[0])[1]
        log.info("quantize: blocks of %s instead of %d in %s (%d wide)%s", block, asked, names[0], width, more)
    return {"other_blocks": other} if other else {}


def _kept_float(model: PreTrainedModel, linears: Collection[str]) -> list[str]:
    """Matrices of the blocks that no quantizer took: experts of MoE models in one 3-D weight, routers, --bits-for ...=16.

    linears: names of those that have codes, or that belong to parts that are gone.
    """
    prefix, blocks = decoder_blocks(model)
    sizes = {f"{prefix}.{n}": p.numel() for n, p in blocks.named_parameters() if p.ndim > 1}
    kept = {name: size for name, size in sizes.items() if name.removesuffix(".weight") not in linears}
    if kept:
        share, largest = 100 * sum(kept.values()) / sum(sizes.values()), max(kept, key=lambda name: kept[name])
        log.info("quantize: %.0f %% of the blocks' weights stay float, %s for one", share, largest)
    return list(kept)


def _calibration(seen: Read, options: QuantizeOptions) -> JsonObject:
    """What was read, so that a run can be repeated: which text, hash of the ids, how many, and how they were chosen."""
    if not seen.windows:
        return {}
    return {
        "text": seen.text,
        "sha256_of_ids": hashlib.sha256(np.concatenate(seen.windows).tobytes()).hexdigest(),
        "windows": len(seen.windows),
        "token_budget": options.calibration_tokens,
        "seed": "the text from its beginning" if options.calibration_seed is None else options.calibration_seed,
    }
