"""The same graphs for browsers: operators that onnxruntime's WebAssembly build has, and runs fast.

It lacks GatherBlockQuantized, and its MatMulNBits has a fifth of the speed of MatMulInteger. That has one scale for all columns of
a row, and activations of 8 bits with one scale a token cost KL 0.04 on SmolLM2; with one for all tokens, as DynamicQuantizeLinear
makes them, 0.57. So activations have 16 bits here: two bytes, which are two rows of one product. A product of two rows takes
little longer than one of one row, and hardly anything is lost (docs/generating.md, In a browser; benchmarks/browser.py).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from edgepress.exporters.graph.builder import Builder
from edgepress.pipeline.checkpoint.packed import PackedLinear
from edgepress.pipeline.errors import OptionError

_INTEGERS = "MatMulInteger"
_BYTE = 256.0
_MIDDLE = 128  # zero point of both bytes; unsigned, because signed ones have no fast kernel there
_WIDEST = (2**31 - 1) // (128 * 255)  # rows whose sums of products fit int32
_STEPS = 127 * 256 + 127  # the largest integer whose bytes both fit, low from -128 to 127


def has_bytes(graph: ir.Graph) -> bool:
    """Whether a matrix of the graph is multiplied by activations of two bytes."""
    return any(node.op_type == _INTEGERS for node in graph)


class WebBuilder(Builder):
    """Writes packed matrices as MatMulInteger over the quantizer's codes, transposed: uint8 (in, out).

    Raises OptionError where they are not of 8 bits, or a row has more than one scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[ir.Value, tuple[ir.Value, ...]] = {}  # made once for all the matrices that read a value

    def linear(
        self, x: ir.Value, weight: PackedLinear | np.ndarray, name: str, accuracy_level: int, weight_name: str | None = None
    ) -> ir.Value:
        """``x @ weight.T``; arguments as in Builder."""
        if isinstance(weight, np.ndarray):
            return super().linear(x, weight, name, accuracy_level, weight_name)
        codes, zeros, scales = self._rows_of(weight, weight_name or name)
        return self.op("Mul", [self._product(x, codes, zeros, name), scales], f"{name}.scaled")

    def _product(self, x: ir.Value, codes: ir.Value, zeros: ir.Value, name: str) -> ir.Value:
        """``x @ (codes - zeros)`` in float32."""
        if x not in self._bytes:
            self._bytes[x] = self._in_bytes(x)
        both, step = self._bytes[x]
        integers = self.op(_INTEGERS, [both, codes, self.constant("uint8.middle", np.array(_MIDDLE, np.uint8)), zeros], name)
        floats = self.op("Cast", [integers], f"{name}.floats", to=ir.DataType.FLOAT)
        self.op("Split", [floats], f"{name}.split", [f"{name}.high", f"{name}.low"], axis=0, num_outputs=2)
        high, low = self.nodes[-1].outputs
        high = self.op("Mul", [high, self._number("byte", _BYTE)], f"{name}.high_bytes")
        return self.op("Mul", [self.op("Add", [high, low], f"{name}.steps"), step], f"{name}.product")

    def embedding(self, ids: ir.Value, weight: PackedLinear | np.ndarray, name: str) -> ir.Value:
        """Rows of ``weight`` by ids: columns of the codes that ``linear`` of the same name reads."""
        if isinstance(weight, np.ndarray):
            return super().embedding(ids, weight, name)
        codes, zeros, scales = self._rows_of(weight, name)
        floats = []
        for part, value in (("codes", codes), ("zeros", zeros)):
            gathered = self.op("Gather", [value, ids], f"{name}.{part}_of_ids", axis=-1)
            floats.append(self.op("Cast", [gathered], f"{name}.float_{part}", to=ir.DataType.FLOAT))
        centred = self.op("Sub", floats, f"{name}.centred")  # (hidden, batch, tokens)
        columns = self.op("Mul", [centred, self.op("Gather", [scales, ids], f"{name}.scales_of_ids")], f"{name}.columns")
        return self.op("Transpose", [columns], name, perm=[1, 2, 0])

    def _rows_of(self, weight: PackedLinear, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes (in, out), zero points uint8 (out,) and scales float32 (out,)."""
        if weight.shape[1] > _WIDEST:
            raise OptionError(f"{weight.name} is {weight.shape[1]} wide, and {_WIDEST} are the most; leave --target web out")
        zeros = np.full_like(weight.scales, _MIDDLE, np.uint8) if weight.zeros is None else weight.zeros
        if weight.bits != 8 or weight.permutation is not None or any((x != x[:, :1]).any() for x in (weight.scales, zeros)):
            raise OptionError(
                f"--target web needs codes of 8 bits with one scale a row, which {weight.name} has not; quantize with "
                "--method rtn --bits 8 --group-size -1"
            )
        codes = self.constant(f"{name}.codes", weight.unpacked().T)
        return codes, self.constant(f"{name}.zeros", zeros[:, 0]), self.constant(f"{name}.scales", weight.scales[:, 0])

    def _in_bytes(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Integers of 16 bits as uint8, high bytes before low ones in the first axis, and their step (..., 1)."""
        n = x.name
        whole, step = self._in_steps(x, _STEPS)
        bytes_of = self.op("Div", [whole, self._number("byte", _BYTE)], f"{n}.in_bytes")
        high = self.op("Floor", [self.op("Add", [bytes_of, self._number("half", 0.5)], f"{n}.half_up")], f"{n}.high")
        low = self.op("Sub", [whole, self.op("Mul", [high, self._number("byte", _BYTE)], f"{n}.high_bytes")], f"{n}.low")
        return self._unsigned(self.op("Concat", [high, low], f"{n}.both", axis=0), n), step

    def _in_steps(self, x: ir.Value, most: int) -> tuple[ir.Value, ir.Value]:
        """Integers from -most to most, still float32, and the step (..., 1) of each token that they count.

        A token of zeros has step 0: NaN becomes some integer, and zero with its step.
        """
        n = x.name
        largest = self.op("ReduceMax", [self.op("Abs", [x], f"{n}.abs"), self.integers(-1)], f"{n}.max", keepdims=1)
        step = self.op("Mul", [largest, self._number("step", 1 / most)], f"{n}.step")
        return self.op("Round", [self.op("Div", [x, step], f"{n}.in_steps")], f"{n}.whole"), step

    def _unsigned(self, integers: ir.Value, name: str) -> ir.Value:
        """Integers from -128 to 127 as uint8 around _MIDDLE."""
        shifted = self.op("Add", [integers, self._number("middle", _MIDDLE)], f"{name}.shifted")
        return self.op("Cast", [shifted], f"{name}.uint8", to=ir.DataType.UINT8)

    def _number(self, name: str, value: float) -> ir.Value:
        return self.constant(f"float.{name}", np.array(value, np.float32))
