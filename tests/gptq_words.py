"""GPTQ tensors made and read by plain bit loops, for tests to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into int32 words by a plain bit loop, lower bits first, the last word filled with zeros."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), dtype=np.uint32)
    for row in range(rows):
        for i in range(count):
            for bit in range(bits):
                place = i * bits + bit
                words[row, place // 32] |= np.uint32((int(codes[row, i]) >> bit & 1) << (place % 32))
    return words.view(np.int32)


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse, through one big integer a row."""
    rows = [int.from_bytes(row.astype("<u4").tobytes(), "little") for row in np.ascontiguousarray(words).view(np.uint32)]
    return np.array([[row >> (i * bits) & ((1 << bits) - 1) for i in range(count)] for row in rows], dtype=np.uint8)


def ones(bits: int) -> np.uint32:
    """One in every field of a word."""
    return np.uint32(sum(1 << shift for shift in range(0, 32, bits)))


def v1_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Zero points (groups, out) as gptqmodel writes format v1: it subtracts one from every field.

    For 2, 4 and 8 bits from whole words (convert_gptq_v2_to_v1_format_module), so that a zero borrows from the field above.
    """
    if bits == 3:
        return pack_words((zeros - np.uint8(1)) & np.uint8(7), 3)
    return (pack_words(zeros, bits).view(np.uint32) - ones(bits)).view(np.int32)


def checkpoint_tensors(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, group: int, format: str
) -> dict[str, np.ndarray]:
    """What gptqmodel stores for codes (out, in), zeros and scales (out, groups)."""
    packed_zeros = pack_words(zeros.T, bits) if format == "gptq_v2" else v1_zeros(zeros.T, bits)
    qweight = pack_words(codes, bits).T
    # trap 11: rows beyond the input up to a multiple of 32 codes, whatever they hold
    short = -codes.shape[1] % 32 * bits // 32
    qweight = np.concatenate([qweight, np.full((short, codes.shape[0]), -1, dtype=np.int32)])[: -(-codes.shape[1] // 32) * bits]
    g_idx = np.arange(codes.shape[1], dtype=np.int32) // group
    return {"qweight": qweight, "qzeros": packed_zeros, "scales": scales.T.astype(np.float16), "g_idx": g_idx}


def random_checkpoint(bits: int, columns: int, group: int, format: str, lowest: int = 1, rows: int = 32) -> tuple[Any, ...]:
    dice = np.random.default_rng([bits, columns, group])
    groups = -(-columns // group)
    codes = dice.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zeros = dice.integers(lowest, 1 << bits, (rows, groups), dtype=np.uint8)
    scales = dice.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    return codes, zeros, scales, checkpoint_tensors(codes, zeros, scales, bits, group, format)
