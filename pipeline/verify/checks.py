"""Checks of an artifact folder, one line each: complete, valid, running, and still computing what it was made from.

The light base and onnxruntime are enough for all but the graph check (onnx) and parity (torch, transformers, onnx_ir);
a check whose packages are missing is reported as not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.bench.subject import stages_of
from edgepress.pipeline.errors import EdgepressError, InputError, MissingPackageError, ProofError
from edgepress.pipeline.files import MANIFEST, check_size, files_below
from edgepress.pipeline.metrics.scores import Quality
from edgepress.pipeline.model_files import end_tokens, read_config, read_genai_config
from edgepress.pipeline.options import VerifyOptions
from edgepress.pipeline.registry import require
from edgepress.pipeline.runtime.decoder import LARGEST_GRAPH, MODEL, Decoder
from edgepress.pipeline.text.windows import check_ids, load_tokenizer, same_tokens, vocabulary

State = Literal["ok", "failed", "not checked"]
PROMPT, NEW_TOKENS = "The old house stood", 8
# Largest difference of a logit between the two ways to read a prompt, as a share of the logits' standard deviation. Int8
# activations may round the other way now and then; a cache that is wrong gives differences of the size of the logits.
CACHE_TOLERANCE = 0.1
MOST_NOISE = 0.1  # nats; int8 activations make 0.001 to 0.02 of it in matrices of 4 and 8 bits
FIRST_MESSAGE = [{"role": "user", "content": "Good morning."}]


@dataclass(frozen=True)
class Check:
    """One check. detail: what was measured, or what is wrong and what to do."""

    name: str
    state: State
    detail: str


def verify(folder: Path, options: VerifyOptions) -> Iterator[Check]:
    """Every check in order, each as soon as it is done; the others run even if one fails."""
    original = None if options.original is None else Artifact.load(options.original)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: _files(folder)),
        ("graph", lambda: _graph(folder)),
        ("tokenizer", lambda: _tokenizer(folder)),
        ("chat template", lambda: _chat_template(folder)),
        ("loads", lambda: _loads(folder)),
        ("generates", lambda: _generates(folder)),
    ]
    if original is not None:
        checks.append(("parity", lambda: _parity(folder, original, options)))
    broken = False
    for name, check in checks:
        if broken:
            yield Check(name, "not checked", "the model does not load")
            continue
        try:
            yield Check(name, "ok", check())
        except MissingPackageError as error:
            yield Check(name, "not checked", f"needs a package: {error}")
        except EdgepressError as error:
            yield Check(name, "failed", str(error))
            broken = name == "loads"


def _files(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        raise InputError(f"no {MANIFEST}, so the files cannot be checked; copy the complete folder or export again")
    artifact = Artifact.load(folder)
    if artifact.format != "onnx":
        raise InputError(
            f"{MANIFEST} describes a folder of format {artifact.format}, not onnx; copy the complete folder or export again"
        )
    if MODEL not in artifact.files:
        raise InputError(f"{MANIFEST} does not list {MODEL}; copy the complete folder or export again")
    if damaged := artifact.damaged():
        fault = "differs from the manifest (sha256)" if (folder / damaged[0]).is_file() else "is missing"
        total = f" (damaged files in all: {len(damaged)})" if len(damaged) > 1 else ""
        raise InputError(f"{damaged[0]} {fault}{total}; copy the complete folder again or export again")
    names = [str(p.relative_to(folder)) for p in files_below(folder)]
    others = [name for name in names if name not in artifact.files]
    extra = f"; not in the manifest: {', '.join(others)}" if others else ""
    return f"{len(artifact.files)} of {len(artifact.files)} have the sha256 of the manifest{extra}"


def _graph(folder: Path) -> str:
    """ONNX's own checker with shape inference, on the path: the weights may exceed the size of one protobuf message."""
    require("onnx")
    from onnx import checker

    if not (folder / MODEL).is_file():
        raise InputError(f"no {MODEL}; copy the complete folder again or export again")
    check_size(folder / MODEL, LARGEST_GRAPH)
    _register_normalization()
    try:
        checker.check_model(str(folder / MODEL), full_check=True)
    except Exception as error:  # the checker's and the inference's errors share no public base class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{MODEL} is not a valid ONNX graph ({reason}); copy the complete folder again or export again") from error
    return "valid for the checker of onnx, shapes included"


def _register_normalization() -> None:
    """SimplifiedLayerNormalization is onnxruntime's, but in ONNX's own domain, where the checker demands a schema."""
    from onnx import defs

    name, schema = "SimplifiedLayerNormalization", defs.OpSchema
    if defs.has(name):
        return
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    kinds = schema.AttrType
    defs.register_schema(
        schema(
            name,
            "",
            1,
            inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "T")],
            outputs=[schema.FormalParameter("Y", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[
                schema.Attribute("axis", kinds.INT, ""),
                schema.Attribute("epsilon", kinds.FLOAT, ""),
                schema.Attribute("stash_type", kinds.INT, ""),
            ],
        )
    )


def _tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    config = read_config(folder)
    ids = tokenizer.encode(PROMPT).ids
    size: int = config.get("vocab_size") or 0
    if not ids or max(ids) >= size:
        raise InputError(f"tokenizer.json has ids beyond the {size} tokens of the model; copy the complete folder again")
    return f"{tokenizer.get_vocab_size():,} tokens"


def _chat_template(folder: Path) -> str:
    require("jinja2")
    from edgepress.pipeline.runtime.chat_template import read_template

    template = read_template(folder)
    if template is None:
        return "none: the model continues text"
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(template.render(FIRST_MESSAGE), add_special_tokens=False).ids
    check_ids(ids, tokenizer, vocabulary(folder), "the chat template")
    return f"a first message takes {len(ids)} tokens"


def _loads(folder: Path) -> str:
    decoder = Decoder(folder)
    import onnxruntime

    described = read_genai_config(folder)
    layers = sum(i.name.endswith(".key") for i in decoder.session.get_inputs())
    configured = (described.decoder.num_hidden_layers, described.vocab_size)
    actual = (layers, decoder.session.get_outputs()[0].shape[-1])
    if configured != actual:
        raise InputError(
            f"genai_config.json has {configured[0]} layers with a cache and {configured[1]} tokens, "
            f"but {MODEL} has {actual[0]} and {actual[1]}; export again"
        )
    return f"onnxruntime {onnxruntime.__version__}, caches of {layers} layers, context of {decoder.context:,} tokens"


def _generates(folder: Path) -> str:
    """Greedy tokens from a prompt; and a prompt read token by token through the cache gives the same logits."""
    decoder, tokenizer = Decoder(folder), load_tokenizer(folder)
    ids = np.array(tokenizer.encode(PROMPT).ids, dtype=np.int64)
    whole = decoder.feed(ids, keep=0)[-1]
    if not np.isfinite(whole).all():
        raise InputError(f"the logits of {MODEL} are not finite (NaN or Inf); export again")
    decoder.reset()
    step = [decoder.feed(ids[i : i + 1]) for i in range(len(ids))][-1][-1]
    if not _agree(whole, step, _rounds_activations(folder)):
        raise InputError("a prompt read token by token gives different logits than in one piece; export again")
    decoder.reset()
    new = decoder.greedy(ids, NEW_TOKENS, end_tokens(folder))
    return repr(tokenizer.decode([*ids.tolist(), *new]))


def _agree(whole: np.ndarray, step: np.ndarray, rounded: bool) -> bool:
    """Whether two ways to the same logits (vocabulary,) lead there. rounded: activations are int8, whose noise differs by the way.

    A cache that is not read, or read at the wrong place, moves predictions by whole nats.
    """
    if not rounded:
        return bool(np.abs(step - whole).max() <= CACHE_TOLERANCE * whole.std())
    score = Quality()
    score.add(np.zeros(2, dtype=np.int64), np.stack([step] * 2), np.stack([whole] * 2))
    return bool(score.figures()["kl_mean"] <= MOST_NOISE and np.abs(step - whole).max() <= whole.std())  # of flat logits, too


def _rounds_activations(folder: Path) -> bool:
    """Whether the graph was exported at accuracy level 4, as far as the folder says."""
    steps = Artifact.load(folder).steps if (folder / MANIFEST).is_file() else ()
    return any(step.facts.get("accuracy_level") for step in steps)


def _parity(folder: Path, original: Artifact, options: VerifyOptions) -> str:
    for package in ("torch", "transformers", "onnx_ir", "safetensors"):
        require(package)
    from edgepress.exporters.proof.parity import proof_windows
    from edgepress.exporters.proof.recheck import recheck

    artifact = Artifact.load(folder)
    if artifact.format != "onnx" or not artifact.steps:
        raise InputError(f"no {MANIFEST} records what {folder} was made from; copy the complete folder or export again")
    if not same_tokens(original.path, folder, PROMPT):
        raise ProofError(f"{original.path} has a different tokenizer; give the checkpoint that it was made from")
    switches = artifact.steps[-1].facts.get("rotary_switches", ())
    windows = proof_windows(options.text, folder, switches, options.text_key)
    candidates = [original, *map(Artifact.load, stages_of(artifact))]
    source = next((a for a in candidates if a.identity() == artifact.steps[-1].facts.get("source")), None)
    return recheck(artifact, original, source, windows, options.trust_remote_code)
