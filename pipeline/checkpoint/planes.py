"""Codes of 3, 5 and 6 bits, for which onnxruntime has no operator: the file has no more than their bits, the operator reads 4 or 8.

Of every four bytes that the operator reads (eight at 5 bits), the file has three (five), the planes: each is one of those bytes,
and the bits that its codes leave free hold pieces of the others. onnxruntime puts the others together when it loads the graph
(exporters/graph/planes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Some bits of a byte that is put together: ``(plane & mask) >> shift``."""

    plane: int
    mask: int
    shift: int


class Planes(NamedTuple):
    """How bytes that an operator reads lie in planes.

    operator_bits: of the codes that it takes. own: mask of a plane's bits that are one byte's as it is. others: for each of the
    bytes that are put together, its pieces. number: of planes.
    """

    operator_bits: int
    own: int
    others: tuple[tuple[Piece, ...], ...]
    number: int

    @property
    def parts(self) -> int:
        """Bytes in as many planes."""
        return self.number + len(self.others)


PLANES = {
    3: Planes(4, 0x77, ((Piece(0, 0x88, 3), Piece(1, 0x88, 2), Piece(2, 0x88, 1)),), 3),  # two codes a byte
    5: Planes(
        8,
        0x1F,
        (
            (Piece(0, 0xE0, 5), Piece(1, 0x60, 2)),
            (Piece(1, 0x80, 7), Piece(2, 0xE0, 4), Piece(3, 0x20, 1)),
            (Piece(3, 0xC0, 6), Piece(4, 0xE0, 3)),
        ),
        5,
    ),
    6: Planes(8, 0x3F, ((Piece(0, 0xC0, 6), Piece(1, 0xC0, 4), Piece(2, 0xC0, 2)),), 3),
}


def operator_bits(bits: int) -> int:
    """Of the operator that computes with codes of so many bits."""
    return PLANES[bits].operator_bits if bits in PLANES else bits


def file_bytes(operator_bytes: int, bits: int) -> int:
    """In the file, of an array with codes of ``bits``: fewer than the operator reads."""
    planes = PLANES.get(bits)
    return operator_bytes if planes is None else -(-operator_bytes * planes.number // planes.parts)


def split(read: np.ndarray, bits: int) -> list[np.ndarray]:
    """The planes of what an operator reads, uint8; the last axis must be a multiple of ``parts``."""
    planes = PLANES[bits]
    *made, last = np.split(read, planes.parts, axis=-1)
    made, others = [part.copy() for part in made[: planes.number]], [*made[planes.number :], last]
    for other, pieces in zip(others, planes.others, strict=True):
        for piece in pieces:
            made[piece.plane] |= (other << np.uint8(piece.shift)) & np.uint8(piece.mask)
    return made


def joined(planes: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """Inverse of ``split``, as onnxruntime computes it."""
    row = PLANES[bits]
    parts = [plane & np.uint8(row.own) for plane in planes]
    for pieces in row.others:
        found = [(planes[piece.plane] & np.uint8(piece.mask)) >> np.uint8(piece.shift) for piece in pieces]
        parts.append(np.bitwise_or.reduce(found))
    return np.concatenate(parts, axis=-1)
