"""A Hugging Face checkpoint as GGUF, and what llama.cpp makes of it. Needs llama-cpp-python and gguf, and no edgepress."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
}  # fmt: skip  # enum llama_ftype
_SLIDING_PATTERN = 6  # llama.cpp takes every sixth layer of Gemma 3 for a global one


def convert(folder: str, out: str, types: list[str], imatrix: str | None = None) -> dict[str, Any]:
    """A checkpoint (llama, qwen2 or gemma3) as TYPE.gguf in ``out`` for every type; type -> what is known of the file.

    imatrix: file of importances (.npz), the mean square of each input of a matrix by its module's name in the checkpoint.
    """
    whole = Path(out) / "float.gguf"
    write(Path(folder), whole)
    squares = None if imatrix is None else _by_tensor(Path(folder), np.load(imatrix))
    found = {}
    for name in types:
        quantize(whole, Path(out) / f"{name}.gguf", name, squares)
        found[name] = described(Path(out) / f"{name}.gguf")
    whole.unlink()
    return found


def quantize(source: Path, file: Path, kind: str, imatrix: dict[str, np.ndarray] | None = None) -> None:
    """What llama.cpp's own tool makes of a GGUF, also of one that is quantized already. imatrix: float32, by GGUF tensor."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = FILE_TYPES[kind], 2, True
    if imatrix is not None:
        rows = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # the last, of zeros, ends it
        for row, (name, squares) in zip(rows, imatrix.items(), strict=False):
            row.name, row.size = name.encode(), squares.size
            row.data = squares.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = ctypes.cast(rows, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings)):
        sys.exit(f"llama.cpp could not quantize {file}")


def described(file: Path) -> dict[str, Any]:
    """Bytes a token, bits of the blocks, types and the head of a GGUF. file_bytes: of its tensors, without the tokenizer."""
    import gguf

    tensors = gguf.GGUFReader(file).tensors
    # Where no output.weight is there the embedding is the head.
    head = next((t for t in tensors if t.name == "output.weight"), None)
    embedding = next(t for t in tensors if t.name == "token_embd.weight")
    last = head or embedding
    read = sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight") + (0 if head else int(embedding.n_bytes))
    blocks = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return {
        "bytes_per_token": read,
        "head": last.tensor_type.name,
        "block_bits": 8 * sum(int(t.n_bytes) for t in blocks) / sum(int(t.n_elements) for t in blocks),
        "blocks": sorted({t.tensor_type.name for t in blocks}),
        "file_bytes": sum(int(t.n_bytes) for t in tensors),
    }


def write(folder: Path, file: Path) -> None:
    """The weights in their own types, norms in float32; the vocabulary is left out, for all that is fed are ids."""
    import gguf

    config, kind, names = _names(folder)
    writer = gguf.GGUFWriter(file, kind)
    _describe(writer, config, kind)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tied = config.get("tie_word_embeddings")
    for shard in sorted(folder.glob("model*.safetensors")):
        for name, array in _tensors(shard):
            stem, _, part = name.rpartition(".")
            if tied and stem == "lm_head":
                continue
            if array.ndim == 1:
                array = array.astype(np.float32) + (1 if kind == "gemma3" and "norm" in name else 0)  # it is stored less one
            count = heads.get(stem.rpartition(".")[2])
            if kind == "llama" and count and part == "weight":
                # llama.cpp rotates neighbouring rows of this architecture, transformers those half a head apart
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(f"{names.get_name(stem)}.{part}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(folder: Path) -> tuple[dict[str, Any], str, Any]:
    """The config of a checkpoint, its architecture, and the map from its names to GGUF's."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    kind = {"gemma3_text": "gemma3"}.get(config["model_type"], config["model_type"])
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "gemma3": gguf.MODEL_ARCH.GEMMA3}[kind]
    return config, kind, gguf.get_tensor_name_map(arch, config["num_hidden_layers"])


def _by_tensor(folder: Path, squares: Any) -> dict[str, np.ndarray]:
    names = _names(folder)[2]
    return {f"{names.get_name(module)}.weight": np.ascontiguousarray(squares[module], np.float32) for module in squares.files}


def _describe(writer: Any, config: dict[str, Any], kind: str) -> None:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    if kind == "gemma3":
        layers = config["layer_types"]
        pattern = [("sliding_attention", "full_attention")[(n + 1) % _SLIDING_PATTERN == 0] for n in range(len(layers))]
        if layers != pattern:
            sys.exit("llama.cpp knows Gemma 3 only with every sixth layer global; layers were removed here")
        writer.add_sliding_window(config["sliding_window"])
        rope = rope["full_attention"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)


def _tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of every tensor; bfloat16, which numpy does not know, widened to float32."""
    content = np.memmap(file, np.uint8, "r")
    length = int(content[:8].view("<u8")[0])
    for name, row in json.loads(content[8 : 8 + length].tobytes()).items():
        if name != "__metadata__":
            first, last = (8 + length + end for end in row["data_offsets"])
            kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[row["dtype"]]
            array = content[first:last].view(kind).reshape(row["shape"])
            yield name, (array.astype(np.uint32) << 16).view(np.float32) if row["dtype"] == "BF16" else array
