"""The files that benchmarks/engines/compare.py compares: shapes, checkpoints, and what each engine makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.models import REFERENCE

if TYPE_CHECKING:
    import onnx_ir as ir

COMMON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float16"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SHAPES: dict[str, dict[str, Any]] = {
    "smol": COMMON | LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 1e5,
    },
    "qwen": COMMON | QWEN | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6,
    },
    "llama": COMMON | LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5,
    },
}  # fmt: skip
TITLES = {"smol": "SmolLM2-135M shape", "qwen": "Qwen2.5-0.5B shape", "llama": "Llama-3.2-1B shape", "reference": "reference model"}
# Removed in the row that shows what removal brings: a quarter of the layers, spread over the model.
EVERY_FOURTH = 4
LLAMA_PIP = "pip install llama-cpp-python==0.3.36 --no-binary llama-cpp-python; pip install gguf; then --llama its python"
GENAI_PIP = "pip install onnxruntime-genai==0.18.0"


def build(shape: str, folder: Path, llama: str) -> dict[str, dict[str, Any]]:
    """Engine's row name -> how it is run and what is known of its file; ``missing`` tells how to install one that is not there."""
    source = REFERENCE if shape == "reference" else once(folder / "checkpoint", lambda out: checkpoint(SHAPES[shape], out))
    engines: dict[str, dict[str, Any]] = {}
    for name, method, group, head, kept in ours(shape):
        start = source if kept is None else once(folder / "fewer-layers", lambda out: fewer_layers(source, out))
        packed = folder / f"{name}-packed"
        flags = ["--method", method, "--group-size", str(group), "--head-bits", str(head)]
        once(packed, lambda out, start=start, flags=flags: press("quantize", str(start), str(out), *flags))  # type: ignore[misc]
        stage = "export" if shape == "reference" else "unproven export"
        artifact = once(folder / name, lambda out, packed=packed, stage=stage: press(stage, str(packed), str(out)))  # type: ignore[misc]
        engines[name] = {"kind": "ours", "file": str(artifact)} | described(artifact)
    try:
        import onnxruntime_genai  # noqa: F401

        built = once(folder / "builder-int4", lambda out: builder(source, out))
        engines["model builder, int4"] = {"kind": "genai", "file": str(built)} | described(built)
    except ImportError:
        engines["model builder, int4"] = {"missing": GENAI_PIP}
    known = subprocess.run([llama, "-c", "import llama_cpp, gguf"], capture_output=True).returncode == 0
    gguf = once(folder / "gguf", lambda out: convert(source, out, llama, ("Q4_0", "Q4_K_M"))) if known else None
    found = json.loads((gguf / "files.json").read_text()) if gguf else {}
    for name in ("Q4_0", "Q4_K_M"):
        row = {"kind": "llama", "file": str(gguf / f"{name}.gguf")} | found[name] if gguf else {"missing": LLAMA_PIP}
        engines[f"llama.cpp {name}"] = row
    return engines


def ours(shape: str) -> list[tuple[str, str, int, int, str | None]]:
    """Name, method, group size, bits of the head, and whether layers are removed."""
    if shape == "reference":
        rows = [("gptq", group, head) for group, head in ((128, 8), (64, 8), (128, 4))]
        return [(f"edgepress {m} {g}, head {h} bits", m, g, h, None) for m, g, h in rows]
    group = 128 if SHAPES[shape]["hidden_size"] % 128 == 0 else 64
    rows: list[tuple[str, str, int, int, str | None]] = [
        (f"edgepress, head {head} bits", "rtn", group, head, None) for head in (4, 8)
    ]
    if shape != "llama":  # shown on two shapes
        rows.append(("edgepress, head 8 bits, a quarter of the layers removed", "rtn", group, 8, "removed"))
    return rows


def once(out: Path, make: Callable[[Path], Any]) -> Path:
    """``out``, made if it is not there; cut short, it is not there."""
    if not out.exists():
        print(f"building {out}", file=sys.stderr, flush=True)
        part = out.with_name(out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(out)
    return out


def checkpoint(shape: dict[str, Any], out: Path) -> None:
    """Random float16 weights; the embedded model's tokenizer, whose ids are the first of the vocabulary."""
    import torch
    from edgepress.pipeline.checkpoint.load import build_meta_model, read_config
    from edgepress.pipeline.checkpoint.update import carry_files
    from edgepress.pipeline.files import write_json
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    carry_files(REFERENCE, out, trusted=False)
    content = {key: value for key, value in shape.items() if key != "rope_theta"}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    write_json(out / "config.json", content)
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(parameter.shape, dtype=torch.float16)
        if "norm" in name
        else torch.empty(parameter.shape, dtype=torch.float16).normal_(std=0.02)
        for name, parameter in build_meta_model(read_config(out), out).named_parameters()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(source: Path, out: Path) -> None:
    """The checkpoint without every fourth layer."""
    from edgepress.pipeline.checkpoint.folder import Checkpoint
    from edgepress.pipeline.prune.surgery import pruned_config, remove_blocks

    out.mkdir()
    checkpoint = Checkpoint(source)
    kept = [index for index in range(checkpoint.layers) if index % EVERY_FOURTH != 2]
    remove_blocks(checkpoint, out, "model.layers", kept, pruned_config(checkpoint, kept))


def press(stage: str, *arguments: str) -> None:
    """A stage of edgepress. "unproven export" leaves out proof and choice of level: minutes for random weights."""
    skip = (
        "from edgepress.exporters.proof import accuracy_level, parity; "
        "parity.prove = lambda *a: parity.Parity(*[0] * 10); "
        "accuracy_level.choose = lambda *a: accuracy_level.Choice(4, 'not measured'); "
        if stage == "unproven export"
        else ""
    )
    start = f"import sys; {skip}from edgepress.pipeline.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, stage.split()[-1], *arguments]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def builder(source: Path, out: Path) -> None:
    """The model builder's default: int4, round to nearest, for the CPU."""
    with tempfile.TemporaryDirectory(prefix="edgepress-builder-") as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", out, "-p", "int4", "-e", "cpu"]
        if subprocess.run([*map(str, command), "-c", cache], stdout=sys.stderr).returncode:
            sys.exit(f"the model builder failed on {source}")


def convert(source: Path, out: Path, llama: str, types: Sequence[str], imatrix: Path | None = None) -> None:
    """TYPE.gguf of every type in ``out``, and files.json, which describes them. imatrix: see gguf_writer.py."""
    out.mkdir()
    job = {"folder": str(source), "out": str(out), "types": list(types), "imatrix": imatrix and str(imatrix)}
    (out / "files.json").write_text(json.dumps(process(llama, "convert", job)))


def described(folder: Path) -> dict[str, Any]:
    """Bytes a token, bits of the blocks, and the head of an ONNX file."""
    import onnx_ir as ir
    from edgepress.exporters.graph.files import weight_bytes_per_token

    model = ir.load(folder / "model.onnx")
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    bits, weights, heads = 0, 0, []
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            rows, columns = (node.attributes[key].as_int() for key in ("N", "K"))
            width, block = (node.attributes[key].as_int() for key in ("bits", "block_size"))
            if rows == vocabulary or ".layers." not in (node.name or ""):  # in parts, where rare tokens have fewer bits
                heads.append((rows, width, block))
            else:
                weights += rows * columns
                stored = [tensor for value in node.inputs[1:] if value is not None for tensor in _stored(value)]
                bits += 8 * sum(tensor.nbytes for tensor in stored)
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    block_bits = bits / weights if weights else 32.0
    head = "float"
    if heads:
        _, width, block = max(heads, key=lambda part: part[1])
        few = {other for _, other, _ in heads} - {width}
        share = sum(rows for rows, other, _ in heads if other in few) / vocabulary
        head = f"{width} bits, block {block}" + "".join(f", {n} for {100 * share:.0f} % of the tokens" for n in few)
    return {"bytes_per_token": weight_bytes_per_token(model), "head": head, "block_bits": block_bits, "file_bytes": size}


def _stored(value: ir.Value) -> list[ir.TensorProtocol]:
    """The arrays behind a constant input: scales are kept in float16 and cast, codes of 3, 5 and 6 bits joined of planes."""
    producer = value.producer()
    if producer is None:
        return [] if value.const_value is None else [value.const_value]
    first = producer.inputs[:1] if producer.op_type == "Reshape" else producer.inputs
    return [tensor for read in first if read is not None for tensor in _stored(read)]


def process(python: str, kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a process of an engine answers."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [python, str(Path(__file__).with_name("engine_process.py")), kind, file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
