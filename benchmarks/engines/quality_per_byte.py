"""Quality for bytes: one checkpoint under our quantizers and under llama.cpp's, with and without its importance matrix.

    python benchmarks/engines/quality_per_byte.py CHECKPOINT --llama LLAMA_PYTHON --text wiki.test.raw --text stories.txt
        [--off-grid] [--calibration mixed|TEXT] [--tune-tokens 65536] [--only PART] [--untuned] [--plot FILE.svg]

CHECKPOINT: llama, qwen2 or gemma3 with float weights, a .gguf file or "reference". Both sides calibrate on the same tokens of
--calibration (the importance matrix, GPTQ, the choice of bits); --text is what none of them has read. LLAMA_PYTHON: see compare.py.
A row "in TYPE's bytes" is what --max-size makes of the bytes of llama.cpp's file with an importance matrix, which may be a little
larger than the one without; bits of blocks and head are chosen.

--off-grid: weights that come from a GGUF file lie on its grid, which flatters its own formats. This benchmarks a model of the same
function whose weights lie on none: every column of a matrix is multiplied by a random factor of about a fifth, and what feeds the
column (a norm, the rows of v or up) divided by it.

Quality is measured as in real_models.py. MB are those of all weights, for our artifacts with the graph. Built files are kept in
--work: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from compare import TUNABLES
from edgepress.pipeline import stages
from edgepress.pipeline.bench.journal import Journal
from edgepress.pipeline.checkpoint.folder import Checkpoint
from edgepress.pipeline.checkpoint.update import carry_files
from edgepress.pipeline.files import sha256, write_json
from edgepress.pipeline.options import MIXED, QuantizeOptions
from edgepress.pipeline.own_text.kept import with_text
from edgepress.pipeline.quantize.budget import carried
from edgepress.pipeline.text.windows import text_windows
from engine_files import convert, described, once, press, process
from real_models import CONTEXT, Engines, scored
from safetensors.torch import save_file

TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
TOKENS = 16384  # of the calibration text
SPREAD = 0.2  # standard deviation of the logarithm of a column's factor
# Row -> flags of quantize; a row that ends in "tuned" is the one before it after a tune stage.
OURS = {
    "rtn 4/128": "--method rtn --group-size 128",
    "rtn 4/64": "--method rtn --group-size 64",
    "rtn 4/32": "--method rtn --group-size 32",
    "gptq 4/128": "--method gptq --group-size 128",
    "gptq 4/64": "--method gptq --group-size 64",
    "gptq 4/64, tuned": "",
    "gptq 4/32": "--method gptq --group-size 32",
    "gptq 4/32, tuned": "",
    "mix of 3.5 bits": "--method gptq --target-bits 3.5",
    "mix of 3.5 bits, tuned": "",
    "mix of 4.5 bits": "--method gptq --target-bits 4.5",
    "mix of 4.5 bits, tuned": "",
    "mix of 5.2 bits": "--method gptq --target-bits 5.2",
    "mix of 5.2 bits, tuned": "",
    "mix of 6.5 bits": "--method gptq --target-bits 6.5",
    "rtn 8/64": "--method rtn --bits 8 --group-size 64",
    "nf4": "--method nf4",
    "int8": "--method int8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--off-grid", action="store_true")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=Path, default=MIXED, help="a text, self or mixed (default: mixed)")
    parser.add_argument("--tune-tokens", type=int, default=65536, help="of a tune stage (default: %(default)s)")
    parser.add_argument("--only", action="append", help="our rows whose name contains this (default: all)")
    parser.add_argument("--untuned", action="store_true", help="leave out the rows after a tune stage, which take most of the time")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--plot", type=Path, help="a figure of KL against bytes, .svg or .png")
    parser.add_argument("--work", type=Path, default=Path("out/quality-per-byte"), help="built files (default: %(default)s)")
    options = parser.parse_args()
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    source = stages.source_of(options.checkpoint)
    folder = options.work / f"{source.identity()[:12]}{'-off-grid' if options.off_grid else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = source.path
    if options.off_grid:
        checkpoint = once(folder / "checkpoint", lambda out: off_grid(Checkpoint(source.path), out))
    options.calibration = with_text(QuantizeOptions(calibration=options.calibration), checkpoint).calibration
    folder /= sha256(options.calibration)[:8]
    folder.mkdir(exist_ok=True)
    known = theirs(checkpoint, folder, options)
    engines = ours(checkpoint, folder, known, options) | known
    journal = Journal(folder / "samples.jsonl")
    columns = {text: scored(text, checkpoint, engines, folder, journal, options) for text in options.text}
    table(engines, columns)
    if options.plot:
        plot(engines, columns, options.plot)


def off_grid(checkpoint: Checkpoint, out: Path) -> None:
    """The same function in other weights: see above. Norms of Gemma hold a factor less one."""
    out.mkdir()
    carry_files(checkpoint.path, out, trusted=False)
    write_json(out / "config.json", checkpoint.raw_config)
    config, generator = checkpoint.config.get_text_config(), torch.Generator().manual_seed(0)
    added = 1.0 if "gemma" in config.model_type else 0.0
    tensors = {name: tensor.float().clone() for name, tensor in checkpoint.tensors()}
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        second = "pre_feedforward" if f"{prefix}pre_feedforward_layernorm.weight" in tensors else "post_attention"
        for norm, readers in (("input", ("q", "k", "v")), (second, ("gate", "up"))):
            factors = _factors(config.hidden_size, generator)
            weight = tensors[f"{prefix}{norm}_layernorm.weight"]
            weight.add_(added).div_(factors).sub_(added)
            for reader in readers:
                tensors[f"{prefix}{'mlp' if norm == second else 'self_attn'}.{reader}_proj.weight"].mul_(factors)
        values = _factors(config.num_key_value_heads * head_size, generator)
        _divide_rows(tensors, f"{prefix}self_attn.v_proj", values)
        tensors[f"{prefix}self_attn.o_proj.weight"].mul_(values.view(-1, head_size).repeat_interleave(shared, 0).flatten())
        channels = _factors(config.intermediate_size, generator)
        _divide_rows(tensors, f"{prefix}mlp.up_proj", channels)
        tensors[f"{prefix}mlp.down_proj.weight"].mul_(channels)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})


def _factors(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.exp(SPREAD * torch.randn(count, generator=generator))


def _divide_rows(tensors: dict[str, torch.Tensor], module: str, factors: torch.Tensor) -> None:
    tensors[f"{module}.weight"].div_(factors[:, None])
    if f"{module}.bias" in tensors:
        tensors[f"{module}.bias"].div_(factors)


def ours(checkpoint: Path, folder: Path, known: Engines, options: argparse.Namespace) -> Engines:
    """Our rows, built. known: llama.cpp's, for rows of as many bytes."""
    engines: Engines = {}
    text = ["--calibration", str(options.calibration), "--calibration-tokens", str(TOKENS)]
    beside = carried(Checkpoint(checkpoint))  # tokenizers are not counted in these tables
    sizes: dict[str, str] = {}
    for name, engine in known.items():
        row = f"in {name.split()[1].rstrip(',')}'s bytes"
        sizes |= {row: f"--method gptq --max-size {engine['file_bytes'] + beside}", f"{row}, tuned": ""}
    for name, flags in (OURS | sizes).items():
        if (options.only and not any(part in name for part in options.only)) or (options.untuned and not flags):
            continue
        packed = folder / "packed" / name.replace("/", "-")
        packed.parent.mkdir(exist_ok=True)
        if not flags:
            start = folder / "packed" / name.rpartition(",")[0].replace("/", "-")
            more = ["--original", str(checkpoint), "--tune-tokens", str(options.tune_tokens)]
            once(packed, lambda out, start=start, more=more: press("tune", str(start), str(out), *more))  # type: ignore[misc]
        else:
            calibrated = flags.split() + (text if "gptq" in flags else [])
            once(packed, lambda out, given=calibrated: press("quantize", str(checkpoint), str(out), *given))  # type: ignore[misc]
        artifact = once(
            folder / packed.name,
            lambda out, packed=packed: press("unproven export", str(packed), str(out), "--accuracy-level", "4"),
        )  # type: ignore[misc]
        engines[name] = {"kind": "ours", "file": str(artifact)} | described(artifact)
    return engines


def theirs(checkpoint: Path, folder: Path, options: argparse.Namespace) -> Engines:
    """llama.cpp's rows, quantized by its own library from the floats; ``imatrix``: weighed by the calibration text."""
    types = options.types.split(",") if options.types else []
    if not types:
        return {}
    importances = folder / "importances.npz"
    if not importances.exists():
        windows = text_windows(options.calibration, checkpoint, budget=TOKENS, length=CONTEXT)
        job = {"folder": str(checkpoint), "windows": [ids.tolist() for ids in windows], "threads": options.threads}
        process(sys.executable, "importances", job | {"out": str(importances)})
    engines: Engines = {}
    for kind, imatrix in (("", None), (", imatrix", importances)):
        for name in types:
            place = folder / f"gguf-{name}{'-imatrix' if imatrix else ''}"
            made = once(place, lambda out, name=name, imatrix=imatrix: convert(checkpoint, out, options.llama, [name], imatrix))  # type: ignore[misc]
            known = json.loads((made / "files.json").read_text())[name]
            engines[f"llama.cpp {name}{kind}"] = {"kind": "llama", "file": str(made / f"{name}.gguf")} | known
    return engines


def frontier(engines: Engines, scores: dict[str, dict[str, float]]) -> Iterator[str]:
    """Rows that no other beats: by fewer bytes at no more KL, or by less KL in no more bytes."""
    for name, engine in engines.items():
        point = engine["file_bytes"], scores[name]["kl_mean"]
        others = ((other["file_bytes"], scores[key]["kl_mean"]) for key, other in engines.items())
        if not any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in others):
            yield name


def table(engines: Engines, columns: dict[Path, dict[str, dict[str, float]]]) -> None:
    """By bytes; in bold what no other row beats in both bytes and KL of the first text."""
    best = set(frontier(engines, next(iter(columns.values()))))
    texts = "".join(f" {text.stem}: KL, nats | perplexity |" for text in columns)
    print(f"| file | MB | bits a block weight | head |{texts}")
    print("| --- | ---: | ---: | --- |" + " ---: |" * (2 * len(columns)))
    for name, engine in sorted(engines.items(), key=lambda item: item[1]["file_bytes"]):
        shown = f"**{name}**" if name in best else name
        cells = [shown, f"{engine['file_bytes'] / 1e6:.1f}", f"{engine['block_bits']:.2f}", engine["head"]]
        for scores in columns.values():
            growth = 100 * (scores[name]["perplexity"] / scores["original"]["perplexity"] - 1)
            cells += [f"{scores[name]['kl_mean']:.4f}", f"{growth:+.1f} %"]
        print(f"| {' | '.join(cells)} |")


def plot(engines: Engines, columns: dict[Path, dict[str, dict[str, float]]], file: Path) -> None:
    """KL against bytes, both logarithmic, a panel for each text."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    kinds = {"edgepress": ("C0", "o"), "edgepress, tuned": ("C3", "o"), "llama.cpp": ("C7", "s"), "llama.cpp, imatrix": ("C2", "s")}
    figure, axes = pyplot.subplots(1, len(columns), figsize=(6 * len(columns), 4.5), squeeze=False, layout="constrained")
    for axis, (text, scores) in zip(axes[0], columns.items(), strict=True):
        for kind, (colour, marker) in kinds.items():
            rows = sorted((e["file_bytes"] / 1e6, scores[n]["kl_mean"], n) for n, e in engines.items() if _kind(n) == kind)
            axis.plot([x for x, _, _ in rows], [y for _, y, _ in rows], marker, color=colour, label=kind)
            for x, y, name in rows:
                axis.annotate(
                    name.removeprefix("llama.cpp ").partition(",")[0], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points"
                )
        axis.set(xscale="log", yscale="log", xlabel="MB of weights", ylabel="KL to the float model, nats a token", title=text.stem)
    axes[0][0].legend()
    figure.savefig(file)


def _kind(name: str) -> str:
    engine = "llama.cpp" if name.startswith("llama.cpp") else "edgepress"
    return next((f"{engine}, {end}" for end in ("tuned", "imatrix") if name.endswith(f", {end}")), engine)


if __name__ == "__main__":
    main()
