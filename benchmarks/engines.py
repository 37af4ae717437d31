"""Our artifacts beside what people run otherwise: onnxruntime-genai's model builder and llama.cpp, in one interleaved run.

    python benchmarks/engines.py --shape qwen --llama LLAMA_PYTHON [--repeats 5] [--build-only]
    python benchmarks/engines.py --shape reference --llama LLAMA_PYTHON --text HELD_OUT.txt

Shapes smol (SmolLM2-135M), qwen (Qwen2.5-0.5B) and llama (Llama-3.2-1B) have random weights, which cost the same time as trained
ones; ``reference`` is the embedded trained model, and adds quality: KL and perplexity of every engine's file over the same tokens.
LLAMA_PYTHON is the interpreter of an environment with llama.cpp, compiled for the processor at hand:

    python -m venv llama
    llama/bin/pip install llama-cpp-python==0.3.36 --no-binary llama-cpp-python
    llama/bin/pip install gguf

Each sample comes from a fresh process; a round runs every engine once, each round in another order. Everybody has the same number
of threads and the same GLIBC_TUNABLES. Files are built once in --work, samples kept there: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.models import REFERENCE
from edgepress.pipeline.measure import Journal, measured
from edgepress.pipeline.stats import ratio

PROMPT, NEW_TOKENS = 128, 64
TUNABLES = "glibc.malloc.hugetlb=1"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=TITLES, default="smol")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--text", type=Path, help="held-out text for the reference model's quality")
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, default=Path("out/engines"), help="built files and samples (default: out/engines)")
    parser.add_argument("--build-only", action="store_true", help="build the files, measure nothing")
    options = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = TUNABLES  # every process below inherits it
    folder = options.work / options.shape
    folder.mkdir(parents=True, exist_ok=True)
    engines = build(options.shape, folder, options.llama)
    if options.build_only:
        return
    journal = Journal(folder / "samples.jsonl", threads=options.threads, tunables=TUNABLES)
    samples, bandwidth = rounds(engines, options, journal)
    print(f"{TITLES[options.shape]}, {options.threads} threads, GLIBC_TUNABLES={TUNABLES}, medians of {options.repeats} rounds, "
          f"memory {bandwidth / 1e9:.1f} GB/s\n")  # fmt: skip
    speed_table(engines, samples)
    removal(engines, samples)
    if options.shape == "reference" and options.text:
        quality_table(engines, samples, folder, options)


# -- building -------------------------------------------------------------------------------------------------------------------


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
    gguf = once(folder / "gguf", lambda out: convert(source, out, llama)) if known else None
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
    from edgepress.pipeline.artifact import write_json
    from edgepress.pipeline.checkpoint import carry_files, meta_model
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    carry_files(REFERENCE, out)
    content = {key: value for key, value in shape.items() if key != "rope_theta"}
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    write_json(out / "config.json", content)
    torch.manual_seed(0)
    tensors = {
        name: torch.ones(parameter.shape, dtype=torch.float16)
        if "norm" in name
        else torch.empty(parameter.shape, dtype=torch.float16).normal_(std=0.02)
        for name, parameter in meta_model(out).named_parameters()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(source: Path, out: Path) -> None:
    """The checkpoint without every fourth layer."""
    from edgepress.pipeline.artifact import read_json
    from edgepress.pipeline.surgery import pruned_config, remove_blocks

    out.mkdir()
    count = read_json(source / "config.json")["num_hidden_layers"]
    kept = [index for index in range(count) if index % EVERY_FOURTH != 2]
    remove_blocks(source, out, "model.layers", kept, pruned_config(source, kept))


def press(stage: str, *arguments: str) -> None:
    """A stage of edgepress. "unproven export" leaves out the proof: minutes for random weights, and export_memory.py has it."""
    skip = "from edgepress.exporters import parity; parity.prove = lambda *a, **k: []; " if stage == "unproven export" else ""
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


def convert(source: Path, out: Path, llama: str) -> None:
    out.mkdir()
    (out / "files.json").write_text(json.dumps(process(llama, "convert", {"folder": str(source), "out": str(out)})))


def described(folder: Path) -> dict[str, Any]:
    """Bytes a token, bits of the blocks, and the head of an ONNX file."""
    import onnx_ir as ir
    from edgepress.exporters.graph import weight_bytes_per_token

    model = ir.load(folder / "model.onnx")
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    bits, weights, head = 0, 0, "float"
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            rows, columns = (node.attributes[key].as_int() for key in ("N", "K"))
            width, block = (node.attributes[key].as_int() for key in ("bits", "block_size"))
            if rows == vocabulary:
                head = f"{width} bits, block {block}"
            else:
                weights += rows * columns
                bits += 8 * sum(v.const_value.nbytes for v in node.inputs[1:] if v is not None and v.const_value is not None)
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return {"bytes_per_token": weight_bytes_per_token(model), "head": head, "block_bits": bits / weights, "file_bytes": size}


# -- measuring ------------------------------------------------------------------------------------------------------------------


def rounds(
    engines: dict[str, dict[str, Any]], options: argparse.Namespace, journal: Journal
) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Samples of every engine that is here, by round, and the memory's bandwidth in bytes/s."""
    ids = [int(i) for i in np.random.default_rng(0).integers(1, 5000, PROMPT)]
    present = [name for name, engine in engines.items() if "kind" in engine]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in present}
    widths = []
    for number in range(options.repeats):
        width = journal.once(lambda: measured("bandwidth", {"threads": options.threads}), "bandwidth", number)
        widths.append(width["bytes_per_s"])
        for name in random.Random(number).sample(present, len(present)):
            stamp = max(p.stat().st_mtime_ns for p in [Path(engines[name]["file"]), *Path(engines[name]["file"]).glob("*")])
            sample = journal.once(lambda engine=engines[name]: speed(engine, ids, options), name, stamp, number)  # type: ignore[misc]
            found[name].append(sample)
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found, float(np.median(widths))


def speed(engine: dict[str, Any], ids: list[int], options: argparse.Namespace) -> dict[str, float]:
    """One sample from a fresh process: tokens/s of the prompt and of what follows, and peak bytes."""
    common = {"ids": ids, "new_tokens": NEW_TOKENS, "threads": options.threads}
    if engine["kind"] == "ours":
        one = measured("speed", common | {"folder": engine["file"], "prompt_lengths": [PROMPT]})
        one["prefill_s"] = one["prefill"][str(PROMPT)]
    elif engine["kind"] == "genai":
        one = process(sys.executable, "genai_speed", common | {"folder": engine["file"]})
    else:
        one = process(options.llama, "llama_speed", common | {"file": engine["file"]})
    steps = one["inter_token_ms"]
    return {"prefill": PROMPT / one["prefill_s"], "decode": 1000 * len(steps) / sum(steps), "rss": one["peak_rss_bytes"]}


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


def median(samples: list[dict[str, Any]], figure: str) -> float:
    return float(np.median([sample[figure] for sample in samples]))


def against(samples: dict[str, list[dict[str, Any]]], name: str, other: str, figure: str) -> str:
    """Ratio with its 99 % interval, "" where one is not there."""
    if name == other or other not in samples:
        return ""
    found = ratio([s[figure] for s in samples[name]], [s[figure] for s in samples[other]])
    return f" ({found.value:.2f}x" + (")" if math.isinf(found.high) else f", {found.low:.2f} to {found.high:.2f})")


def speed_table(engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]) -> None:
    """In brackets the ratio to llama.cpp Q4_0 with its 99 % interval, from the pairs of each round."""
    print("| engine | head | bits a block weight | MB per token | prefill 128 tok/s | decode tok/s | decode GB/s | peak RSS MiB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, engine in engines.items():
        if "missing" in engine:
            print(f"| {name} | not installed: `{engine['missing']}` | | | | | | |")
            continue
        speeds = (f"{median(samples[name], f):.0f}{against(samples, name, 'llama.cpp Q4_0', f)}" for f in ("prefill", "decode"))
        read = f"{median(samples[name], 'decode') * engine['bytes_per_token'] / 1e9:.1f}"
        peak = f"{median(samples[name], 'rss') / 2**20:.0f}{against(samples, name, 'llama.cpp Q4_0', 'rss')}"
        print(f"| {name} | {engine['head']} | {engine['block_bits']:.2f} | {engine['bytes_per_token'] / 1e6:.0f} |",
              " | ".join((*speeds, read, peak)), "|")  # fmt: skip


def removal(engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]]) -> None:
    """What removing layers brought, beside what the bytes promise."""
    for name in samples:
        whole, _, cut = name.rpartition(", ")
        if not cut.endswith("removed") or whole not in samples:
            continue
        promised = engines[whole]["bytes_per_token"] / engines[name]["bytes_per_token"]
        found = ratio([s["decode"] for s in samples[name]], [s["decode"] for s in samples[whole]])
        print(f"\n{cut}: decode {found.value:.3f} times ({found.low:.3f} to {found.high:.3f}); "
              f"bytes promise {promised:.3f}; {found.value / promised:.3f} of it")  # fmt: skip


def quality_table(
    engines: dict[str, dict[str, Any]], samples: dict[str, list[dict[str, Any]]], folder: Path, options: argparse.Namespace
) -> None:
    """KL against the original's logits, and perplexity, of each engine's own file over the same tokens."""
    from edgepress.pipeline.checkpoint import load_model
    from edgepress.pipeline.losses import logits_of
    from edgepress.pipeline.tokens import text_windows

    windows = text_windows(options.text, REFERENCE, budget=options.text_tokens)
    original = load_model(REFERENCE)
    truth = [logits_of(original, ids) for ids in windows]
    print(f"\n{sum(len(ids) - 1 for ids in windows):,} tokens of {options.text.name}\n")
    print("| engine | head | bits a block weight | file MB | MB per token | KL, nats | top-1 | perplexity | decode tok/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    whole = quality(windows, truth, truth)
    print(f"| original, torch float32 | | | | | 0 | 1 | {whole['perplexity']:.3f} | |")
    for name, engine in engines.items():
        if "missing" not in engine:
            found = quality(windows, logits(engine, windows, folder, options), truth)
            print(f"| {name} | {engine['head']} | {engine['block_bits']:.2f} | {engine['file_bytes'] / 1e6:.2f} |"
                  f" {engine['bytes_per_token'] / 1e6:.2f} | {found['kl_mean']:.5f} | {found['top1_agreement']:.4f} |"
                  f" {found['perplexity']:.3f} | {median(samples[name], 'decode'):.0f} |")  # fmt: skip


def quality(windows: list[np.ndarray], found: list[np.ndarray], truth: list[np.ndarray]) -> dict[str, float]:
    from edgepress.pipeline.perplexity import Quality

    scores = Quality()
    for ids, own, original in zip(windows, found, truth, strict=True):
        scores.add(ids, own, original)
    return scores.figures()


def logits(engine: dict[str, Any], windows: list[np.ndarray], folder: Path, options: argparse.Namespace) -> list[np.ndarray]:
    """Of every position of every window, each computed by the engine itself."""
    if engine["kind"] == "llama":
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            job = {"file": engine["file"], "windows": [ids.tolist() for ids in windows], "threads": options.threads}
            process(options.llama, "llama_logits", job | {"out": f"{scratch}/logits.npy"})
            return np.split(np.load(f"{scratch}/logits.npy"), np.cumsum([len(ids) for ids in windows])[:-1])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(engine["file"]) / "model.onnx"))
    found = []
    for ids in windows:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
        for one in session.get_inputs():
            if one.name.startswith("past_key_values."):
                feeds[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), dtype=np.float32)
        if engine["kind"] == "ours":
            feeds["logits_to_keep"] = np.zeros(1, dtype=np.int64)
        found.append(session.run(["logits"], feeds)[0][0])
    return found


if __name__ == "__main__":
    main()
