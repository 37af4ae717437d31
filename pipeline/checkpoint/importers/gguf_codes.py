"""The codes of a GGUF file's Q4_0 and Q8_0 matrices, as they are, in the layout and under the names of the checkpoint.

Both are symmetric integers in blocks of 32 with a float16 scale, which is what MatMulNBits computes with. The other types are not:
Q4_1, Q5_1, Q4_K and Q5_K add a float minimum to each block where the operator has an integer zero point (of the Q4_1 blocks of
SmolLM2-135M 0.3 % could be said exactly), and no operator has the 5 and 6 bits of Q5_0 and Q6_K.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from edgepress.pipeline.checkpoint.blocks import block_matrices
from edgepress.pipeline.checkpoint.packed import PackedLinear
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils

if TYPE_CHECKING:
    from gguf import ReaderTensor

BITS = {"Q4_0": 4, "Q8_0": 8}
_BLOCK = 32


def kept_codes(file: Path, model: PreTrainedModel) -> dict[str, tuple[str, PackedLinear]]:
    """Module name -> GGUF type and packed matrix, of every matrix whose codes can be kept.

    model: what transformers made of the file. A matrix is kept only where its codes stand for exactly the weights that the model
    has, so names and the order of rows are proven, not assumed. A tied head is kept under the embedding's name.
    """
    matrices, transposed = block_matrices(model)
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices |= {name: tuple(module.weight.shape) for name, module in model.named_modules() if id(module) in ends}
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    kept: dict[str, tuple[str, PackedLinear]] = {}
    for module, tensor, order in _tensors(file, model, transposed):
        if module not in matrices:
            continue
        tied = model.config.tie_word_embeddings and id(model.get_submodule(module)) in ends
        name = embedding if tied else module
        codes, scales = read_codes(tensor)
        linear = PackedLinear.from_codes(name, codes[order], scales[order], None, BITS[tensor.tensor_type.name], _BLOCK)
        weight = model.get_submodule(module).weight.detach().numpy()
        if np.array_equal(linear.dequantized(), weight.T if module in transposed else weight):
            kept[name] = tensor.tensor_type.name, linear
    return kept


def read_codes(tensor: ReaderTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 (rows, columns), zero point 2 ** (bits - 1), and scales float32 (rows, blocks), as ggml-quants.c reads them."""
    rows, columns = len(tensor.data), int(tensor.shape[0])
    blocks = np.ascontiguousarray(tensor.data).reshape(rows, columns // _BLOCK, -1)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    content = blocks[..., 2:]
    # Q4_0: the low halves of the 16 bytes are the first 16 weights, the high halves the others. Q8_0: two's complement plus 128.
    four = tensor.tensor_type.name == "Q4_0"
    codes = np.concatenate([content & 15, content >> 4], axis=-1) if four else content ^ np.uint8(128)
    return codes.reshape(rows, columns), scales


def _tensors(file: Path, model: PreTrainedModel, transposed: frozenset[str]) -> Iterator[tuple[str, ReaderTensor, np.ndarray]]:
    """The module, the tensor, and which row of it each row of the module is, by transformers' own names and reordering."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    field = reader.get_field("general.architecture")
    architecture = "" if field is None else str(field.contents())
    processors = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS
    settings = modeling_gguf_pytorch_utils.load_gguf_checkpoint(file)["config"]
    processor = processors.get(architecture, modeling_gguf_pytorch_utils.TensorProcessor)(config=settings)
    names = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(model, processor)
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in BITS or len(tensor.shape) != 2:
            continue
        columns, rows = map(int, tensor.shape)
        numbers = np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], (rows, columns))
        placed = processor.process(weights=numbers, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}})
        if (name := names.get(placed.name)) is None:
            continue
        module = name.removesuffix(".weight")
        yield module, tensor, placed.weights[0] if module in transposed else placed.weights[:, 0]
