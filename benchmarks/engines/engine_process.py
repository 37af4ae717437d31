"""What benchmarks/engines/compare.py runs in processes of their own: the engines that are not ours. Needs no edgepress.

    PYTHON engine_process.py KIND JOB.json      (prints one JSON object)

convert, llama_speed and llama_logits need llama-cpp-python and gguf, genai_speed needs onnxruntime-genai.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP_TOKENS, PREFILLS = 8, 3  # as edgepress.pipeline.bench.worker has them
CONTEXT = 512
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15}  # enum llama_ftype


def main() -> None:
    kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    kinds: dict[str, Callable[..., Any]] = {
        "convert": convert, "llama_speed": llama_speed, "llama_logits": llama_logits, "genai_speed": genai_speed,
    }  # fmt: skip
    print(json.dumps(kinds[kind](**job)), file=answer, flush=True)


def convert(folder: str, out: str) -> dict[str, Any]:
    """A Hugging Face checkpoint (llama or qwen2, tied) as GGUF, and from it every file type; vocabulary left out."""
    import gguf

    config = json.loads((Path(folder) / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    kind = config["model_type"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    whole = Path(out) / "float.gguf"
    writer = gguf.GGUFWriter(whole, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1)
    names = gguf.get_tensor_name_map(
        {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[kind], config["num_hidden_layers"]
    )
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, array in _tensors(file):
            array = array.astype(np.float32) if array.ndim == 1 else array
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp rotates neighbouring rows of this architecture, transformers those half a head apart
                count = heads if "q_proj" in name else groups
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            stem, _, part = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(stem)}.{part}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    import llama_cpp

    found = {}
    for name, number in FILE_TYPES.items():
        file = Path(out) / f"{name}.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = number, 2
        if llama_cpp.llama_model_quantize(str(whole).encode(), str(file).encode(), ctypes.byref(settings)):
            sys.exit(f"llama.cpp could not quantize {file}")
        tensors = gguf.GGUFReader(file).tensors
        # Where no output.weight is there the embedding is the head.
        head = next((t for t in tensors if t.name == "output.weight"), None)
        embedding = next(t for t in tensors if t.name == "token_embd.weight")
        last = head or embedding
        read = sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight") + (0 if head else int(embedding.n_bytes))
        blocks = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        found[name] = {
            "bytes_per_token": read,
            "head": last.tensor_type.name,
            "block_bits": 8 * sum(int(t.n_bytes) for t in blocks) / sum(int(t.n_elements) for t in blocks),
            "blocks": sorted({t.tensor_type.name for t in blocks}),
            "file_bytes": file.stat().st_size,
        }
    whole.unlink()
    return found


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


class _Llama:
    """A GGUF file in libllama, its cache of CONTEXT positions, memory-mapped as it comes."""

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp as lib

        self.lib = lib
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p())
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            sys.exit(f"llama.cpp cannot load {file}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch, self.length = lib.llama_batch_init(CONTEXT, 0, 1), 0

    def reset(self) -> None:
        """Forget the sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.length = 0

    def feed(self, ids: np.ndarray, *, every: bool = False) -> np.ndarray:
        """Append ids (tokens,); float32 logits of the last position (vocabulary,), or of all (tokens, vocabulary)."""
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = int(token), self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == count - 1
        if self.lib.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")
        self.length += count
        if every:
            flat = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(count * self.vocabulary,))
            return flat.reshape(count, self.vocabulary).copy()
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), shape=(self.vocabulary,))


def llama_speed(file: str, ids: list[int], new_tokens: int, threads: int) -> dict[str, Any]:
    """One sample of each figure, taken as edgepress.pipeline.bench.worker.speed takes it."""
    engine, prompt = _Llama(file, threads), np.array(ids)

    def start() -> int:
        engine.reset()
        return int(engine.feed(prompt).argmax())

    return _speed(start, lambda token: int(engine.feed(np.array([token])).argmax()), new_tokens)


def genai_speed(folder: str, ids: list[int], new_tokens: int, threads: int) -> dict[str, Any]:
    """The same for a folder in onnxruntime-genai; it chooses the token itself."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    generator: Any = None

    def start() -> int:
        nonlocal generator
        settings = og.GeneratorParams(model)
        # min_length: no id ends the generation, for every engine writes the same number of tokens
        settings.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    def step(_: int) -> int:
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    return _speed(start, step, new_tokens)


def _speed(start: Callable[[], int], step: Callable[[int], int], new_tokens: int) -> dict[str, Any]:
    """start: reads the prompt from nothing and gives the next token; step: reads a token and gives the next."""

    def timed(call: Callable[..., int], *arguments: int) -> tuple[float, int]:
        begun = time.perf_counter()
        token = call(*arguments)
        return time.perf_counter() - begun, token

    start()
    prefills = [timed(start)[0] for _ in range(PREFILLS)]
    _, token = timed(start)
    for _ in range(WARM_UP_TOKENS):
        _, token = timed(step, token)
    steps = []
    for _ in range(new_tokens):
        seconds, token = timed(step, token)
        steps.append(1000 * seconds)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"prefill_s": statistics.median(prefills), "inter_token_ms": steps, "peak_rss_bytes": peak}


def llama_logits(file: str, windows: list[list[int]], threads: int, out: str) -> dict[str, Any]:
    """Logits of every position of every window, float32 (positions of all, vocabulary), saved as ``out``."""
    engine, found = _Llama(file, threads), []
    for ids in windows:
        engine.reset()
        found.append(engine.feed(np.array(ids), every=True))
    np.save(out, np.concatenate(found))
    return {}


if __name__ == "__main__":
    main()
