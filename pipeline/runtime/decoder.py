"""Run an artifact with plain onnxruntime: the light base is enough, no torch and no transformers.

A Decoder keeps the key-value cache between calls. Where the graph allows it (``edgepress.shared_cache``), past and
present are one buffer, so that a step writes one position instead of copying the cache.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from edgepress.pipeline.documents import short_line
from edgepress.pipeline.errors import EdgepressError, InputError, OptionError
from edgepress.pipeline.files import check_size
from edgepress.pipeline.model_files import read_genai_config
from edgepress.pipeline.registry import require
from edgepress.pipeline.runtime import targets
from edgepress.pipeline.runtime.signature import signature_of

if TYPE_CHECKING:
    import onnxruntime

MODEL = "model.onnx"
LARGEST_GRAPH = (1 << 31) - 1  # bytes of a message of protobuf
# Tokens that a shared cache holds at first: one for the whole context may take more memory than the model.
FIRST_CAPACITY = 256
# In the metadata of a graph: lengths beyond which it rotates with other frequencies, so that no cache may be kept.
SWITCHES = "edgepress.rotary_switches"


def _reason(error: Exception) -> str:
    """The last of onnxruntime's nested messages, without the place in its source that it begins with."""
    last = re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", str(error))[-1]
    return short_line(re.sub(r"^\S+\.(cc|h):\d+ \S+ ", "", last))


class Decoder:
    """One session and one sequence (batch of one).

    ``feed`` appends tokens and gives logits; ``reset`` forgets the sequence. Raises InputError when the folder
    holds no model that onnxruntime can load.
    """

    def __init__(self, folder: Path, *, threads: int = 0, model: str = MODEL, target: str = "cpu") -> None:
        require("onnxruntime")
        import onnxruntime

        if not (folder / model).is_file():
            raise InputError(f"{folder} has no {model}; give the folder that edgepress export wrote")
        check_size(folder / model, LARGEST_GRAPH)
        targets.check_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # 4 is fatal errors only: others are raised anyway, and asking for all positions of the logits draws a warning about the
        # declared shape at each call.
        options.log_severity_level = 4
        try:
            self.session = targets.session(str(folder / model), options, target)
        except EdgepressError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise InputError(
                f"onnxruntime cannot load {folder / model} ({_reason(error)}); copy the complete folder again or export again"
            ) from error
        self._onnxruntime, self._file = onnxruntime, folder / model
        self._device = targets.TARGETS[target].device
        try:
            signature = signature_of(self.session)
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.switches = tuple(int(length) for length in metadata.get(SWITCHES, "").split(",") if length)
        except ValueError as error:
            raise InputError(
                f"{folder / model} is not a graph that edgepress wrote: {error}; give a folder that edgepress export wrote"
            ) from error
        self._shapes = {name: (1, heads, 0, size) for name, (heads, size) in signature.caches.items()}
        # Activations and logits, and the cache unless it is int8: float16 in what is exported for a GPU.
        self.dtype: type[np.float16] | type[np.float32] = np.float16 if signature.half else np.float32
        self._kept: type[np.generic] = np.int8 if signature.int8 else self.dtype
        self.shared = metadata.get("edgepress.shared_cache") == "1"
        self.left_padding = metadata.get("edgepress.batch") == "left-padded"  # the side of padding that it supports
        self.context = read_genai_config(folder).context_length
        self.vocabulary = signature.vocabulary
        self._binding: onnxruntime.IOBinding | None = None  # of the cache, until it is reallocated
        self._capacity = 0
        self._ids: list[int] = []  # of the sequence, where it may have to be read again
        self._frequencies = 0  # that the keys in the cache were rotated with: how many switches lay behind
        self.reset()

    def twin(self, capacity: int) -> Decoder:
        """A decoder of another sequence, of so many tokens, on the same session: weights are in memory once."""
        other = copy.copy(self)
        other._binding, other._cache, other._capacity, other._ids = None, {}, 0, []
        other.reset(capacity)
        return other

    def cache_bytes(self, tokens: int) -> int:
        """Memory of the cache of so many tokens."""
        return sum(heads * size for _, heads, _, size in self._shapes.values()) * tokens * np.dtype(self._kept).itemsize

    def cached(self) -> dict[str, np.ndarray]:
        """Keys and values (heads, tokens, head size) of the sequence, by the name of the graph's input."""
        return {name: value.numpy()[0, :, : self.length] for name, value in self._cache.items()}

    @property
    def held(self) -> int:
        """Tokens that the cache has memory for."""
        return self._capacity if self.shared else self.length

    def reserve(self, capacity: int) -> None:
        """Keep the sequence, and let it become ``capacity`` tokens long."""
        self._limit = capacity
        if self.shared and capacity > self._capacity:
            self._resize(capacity)

    def reset(self, capacity: int | None = None) -> None:
        """Forget the sequence. capacity: tokens that a shared cache holds (default: it grows up to the context)."""
        self.length = 0
        self._limit = capacity or self.context
        if self.shared:
            capacity = capacity or self._capacity or min(FIRST_CAPACITY, self.context)
            if capacity != self._capacity:
                self._binding = None
                self._cache = {name: self._empty(shape, capacity) for name, shape in self._shapes.items()}
                self._capacity = capacity
        else:
            self._cache = {name: self._empty(shape, 0) for name, shape in self._shapes.items()}

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens of the sequence and forget the rest."""
        if not self.shared and any(value.shape()[2] != length for value in self._cache.values()):
            self._cache = {name: self._filled(value.numpy()[:, :, :length]) for name, value in self._cache.items()}
        self.length = length

    def _grow(self, total: int) -> None:
        """Make room for ``total`` tokens in a shared cache, and for more to come."""
        self._resize(min(self.context, max(total, 2 * self._capacity, FIRST_CAPACITY)))

    def _resize(self, capacity: int) -> None:
        """A shared cache of another size; what is in it stays."""
        self._binding = None
        self._capacity = 0  # if interrupted, the next call starts over: caches of both sizes hold what was read
        for name, value in self._cache.items():  # one after the other: never the whole cache twice
            array = value.numpy()
            grown = np.zeros((*array.shape[:2], capacity, array.shape[3]), dtype=array.dtype)
            grown[:, :, : self.length] = array[:, :, : self.length]
            self._cache[name] = self._filled(grown)
        self._capacity = capacity

    def feed(self, ids: np.ndarray, keep: int = 1) -> np.ndarray:
        """Append ids int64 (tokens,); returns float32 logits (kept, vocabulary) of the last ``keep`` positions, 0 for all.

        A sequence whose rotary frequencies change with its new length is read again from its beginning. Raises OptionError
        when the sequence outgrows the context.
        """
        total = self.length + len(ids)
        if total > self._limit:
            raise OptionError(
                f"{total} tokens do not fit into the context of {self._limit}; use a shorter prompt or fewer new tokens"
            )
        if self.length and self._side(total) != self._frequencies:
            return self._feed_again(ids, keep or len(ids))
        if self.shared and total > self._capacity:
            self._grow(total)
        binding = self._binding or self._bound_cache()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        # bind_cpu_input knows only the required inputs, not an overridable initializer
        value = self._onnxruntime.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("logits_to_keep", value(np.array([keep], dtype=np.int64)))
        logits = np.empty((1, 1, self.vocabulary), dtype=self.dtype)
        one = 1 in (keep, len(ids))
        if one:  # asking the binding for its outputs would wrap the whole cache at every token
            binding.bind_ortvalue_output("logits", value(logits))
        else:  # another shape than the declared one only where onnxruntime makes the array
            binding.bind_output("logits", "cpu")
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # such as a token id outside the vocabulary
            raise InputError(
                f"onnxruntime cannot run {self._file}: {str(error).splitlines()[0]}; copy the complete folder again or export again"
            ) from error
        binding.synchronize_outputs()  # a GPU may still be at work when the call returns
        if not self.shared:
            self._cache = dict(zip(self._cache, binding.get_outputs()[1:], strict=True))
        result: np.ndarray = (logits if one else binding.get_outputs()[0].numpy())[0]
        self._binding = binding if self.shared else None
        if self.switches:
            self._ids[self.length :] = ids.tolist()
            self._frequencies = self._side(total)
        self.length = total
        return result.astype(np.float32, copy=False)

    @property
    def unswitched(self) -> int:
        """Tokens that may follow at once and be rotated as each would be alone: up to the next switch of frequencies."""
        return next((switch for switch in self.switches if switch > self.length), self.context) - self.length

    def _side(self, length: int) -> int:
        """How many switches of rotary frequencies a sequence of this length is beyond."""
        return sum(length > switch for switch in self.switches)

    def _feed_again(self, ids: np.ndarray, keep: int) -> np.ndarray:
        """Read the whole sequence once more, with ``ids`` behind it."""
        whole = np.array([*self._ids[: self.length], *ids.tolist()], dtype=np.int64)
        self.rewind(0)
        return self.feed(whole, keep)

    def _bound_cache(self) -> onnxruntime.IOBinding:
        """A binding of the cache; a shared one stays bound until it grows: for small models, binding at every token is slow."""
        binding = self.session.io_binding()
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")  # must be the first of the outputs
        for name, value in self._cache.items():
            present = name.replace("past_key_values", "present")
            if self.shared:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, self._device)
        return binding

    def greedy(self, ids: np.ndarray, new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Feed a prompt and yield the most likely next id, again and again; ends before an id in ``stop``."""
        logits = self.feed(ids)
        for count in range(new_tokens):
            token = int(logits[-1].argmax())
            if token in stop:
                return
            yield token
            if count + 1 < new_tokens:
                logits = self.feed(np.array([token]))

    def forward(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Logits float32 (tokens, vocabulary) of every position of several sequences int64 (tokens,), each from its beginning.

        One run, padded on the right, for all that have the same rotary frequencies; the sequence that ``feed`` builds is
        not changed.
        """
        logits: dict[int, np.ndarray] = {}
        for side in {self._side(len(row)) for row in rows}:
            chosen = [number for number, row in enumerate(rows) if self._side(len(row)) == side]
            logits |= zip(chosen, self._forward([rows[number] for number in chosen]), strict=True)
        return [logits[number] for number in range(len(rows))]

    def _forward(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        length = max(map(len, rows))
        ids = np.zeros((len(rows), length), dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": np.zeros(1, dtype=np.int64)}
        logits = self.session.run(["logits"], feeds | self.empty_cache(len(rows)))[0].astype(np.float32, copy=False)
        return [logits[index, : len(row)] for index, row in enumerate(rows)]

    def greedy_batch(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Most likely next ids (batch,) for prompts of one length, int64 (batch, tokens), again and again up to the context."""
        names = [output.name for output in self.session.get_outputs()]
        cache, seen = self.empty_cache(len(ids)), ids
        total = ids.shape[1]
        while total <= self.context:
            if ids is not seen and self._side(total) != self._side(total - 1):
                cache, ids = self.empty_cache(len(ids)), seen
            feeds = {"input_ids": ids, "attention_mask": np.ones((len(ids), total), dtype=np.int64)}
            logits, *present = self.session.run(names, feeds | cache)
            cache = dict(zip(cache, present, strict=True))
            ids = logits[:, -1].argmax(-1)[:, None]
            seen = np.concatenate([seen, ids], axis=1)
            total += 1
            yield ids[:, 0]

    def step(
        self, ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray] | None = None, extra: Sequence[str] = ()
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """One run over a batch with its own cache, for checks.

        ids int64 (batch, tokens), mask int64 (batch, past and these tokens). Returns the logits of all positions followed
        by the outputs ``extra``, and the cache for the next step.
        """
        cache = cache or self.empty_cache(len(ids))
        names = ["logits", *extra, *(name.replace("past_key_values", "present") for name in cache)]
        feeds = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": np.zeros(1, dtype=np.int64)}
        outputs = self.session.run(names, feeds | cache)
        count = 1 + len(extra)
        return outputs[:count], dict(zip(cache, outputs[count:], strict=True))

    def empty_cache(self, batch: int) -> dict[str, np.ndarray]:
        """An empty cache for a batch."""
        return {name: np.zeros((batch, shape[1], 0, shape[3]), dtype=self._kept) for name, shape in self._shapes.items()}

    def _empty(self, shape: tuple[int, int, int, int], length: int) -> onnxruntime.OrtValue:
        array = np.zeros((1, shape[1], length, shape[3]), dtype=self._kept)
        return self._filled(array)

    def _filled(self, array: np.ndarray) -> onnxruntime.OrtValue:
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)
