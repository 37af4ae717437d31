"""What the scripts beside it run in processes of their own: the engines that are not ours. Needs no edgepress.

    PYTHON engine_process.py KIND JOB.json      (prints one JSON object)

convert, requantize, llama_speed and llama_logits need llama-cpp-python and gguf, genai_speed onnxruntime-genai, torch_logits and
importances transformers.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_writer
import numpy as np

WARM_UP_TOKENS, PREFILLS = 8, 3  # as edgepress.pipeline.bench.worker has them
CONTEXT = 512


def main() -> None:
    kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like
    kinds: dict[str, Callable[..., Any]] = {
        "convert": gguf_writer.convert, "describe": describe, "requantize": requantize, "llama_speed": llama_speed,
        "llama_logits": llama_logits, "genai_speed": genai_speed, "torch_logits": torch_logits, "importances": importances,
    }  # fmt: skip
    print(json.dumps(kinds[kind](**job)), file=answer, flush=True)


class _Llama:
    """A GGUF file in libllama, its cache of CONTEXT positions, memory-mapped as it comes.

    exact: keep the cache in float32, and no flash attention, which rounds to float16 too.
    """

    def __init__(self, file: str, threads: int, exact: bool = False) -> None:
        import llama_cpp as lib

        self.lib = lib
        self._quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._quiet, ctypes.c_void_p())
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = lib.GGML_TYPE_F32
            settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
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


def llama_logits(file: str, windows: list[list[int]], threads: int, out: str, exact: bool = False) -> dict[str, Any]:
    """Logits of every position of every window, float32 (positions of all, vocabulary), saved as ``out``."""
    engine = _Llama(file, threads, exact)

    def logits(ids: np.ndarray) -> np.ndarray:
        engine.reset()
        return engine.feed(ids, every=True)

    return _save(out, windows, logits)


def torch_logits(
    folder: str, windows: list[list[int]], threads: int, out: str, gguf_file: str | None = None, gelu_noise: float | None = None
) -> dict[str, Any]:
    """The same by plain transformers in float32, of a checkpoint or of a GGUF file in ``folder``.

    gelu_noise: read GELU from a table of float16 values, as llama.cpp does, and change the embeddings by so much of themselves.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32).eval()
    if gelu_noise is not None:
        for module in model.modules():
            if hasattr(module, "act_fn"):
                module.act_fn.forward = lambda x: torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            states = model.get_input_embeddings()(torch.from_numpy(ids)[None])
            states = states * (1 + (gelu_noise or 0) * torch.randn_like(states))
            found: np.ndarray = model(inputs_embeds=states, use_cache=False).logits[0].numpy()
        return found

    torch.manual_seed(0)
    return _save(out, windows, logits)


def importances(folder: str, windows: list[list[int]], threads: int, out: str) -> dict[str, Any]:
    """The mean square of each input of every matrix of the blocks, as llama.cpp's imatrix tool has it, saved as ``out`` (.npz)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def adding(name: str) -> Callable[..., None]:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0][0].square().sum(0)  # type: ignore[operator]

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(adding(name))
    with torch.inference_mode():
        for ids in windows:
            model(torch.tensor([ids]), use_cache=False)
    np.savez(out, **{name: (total / sum(map(len, windows))).numpy() for name, total in sums.items()})
    return {}


def _save(out: str, windows: list[list[int]], logits: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Window by window into the file: those of a large vocabulary are gigabytes."""
    first, file = 0, None
    for ids in windows:
        found = logits(np.array(ids))
        if file is None:
            file = np.lib.format.open_memmap(out, "w+", np.float32, (sum(map(len, windows)), found.shape[1]))
        file[first : first + len(ids)] = found
        first += len(ids)
    assert file is not None
    file.flush()
    return {}


def describe(file: str) -> dict[str, Any]:
    """What ``gguf_writer.described`` knows of a file."""
    return gguf_writer.described(Path(file))


def requantize(file: str, out: str, kind: str) -> dict[str, Any]:
    """A GGUF as another type, dequantized and quantized by llama.cpp."""
    gguf_writer.quantize(Path(file), Path(out), kind)
    return gguf_writer.described(Path(out))


if __name__ == "__main__":
    main()
