"""Quantization methods: one row for all that is known of each. To add one: docs/adding-a-quantizer.md."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = (128, -1, 16, 32, 64, 256)


@dataclass(frozen=True)
class Method:
    """One way to quantize a matrix.

    help: for ``--method``. run: "module:function", QuantizeJob -> {name: PackedLinear}; None keeps the weights as they are.
    bits, groups: those that it takes, the default first; -1 is a whole row. packages: what it imports; their versions are part
    of the fingerprint. adjustable: takes --symmetric and --bits-for. act_order: takes --act-order. moved: of
    a calibrated method, whose codes may be further from the weights than rounding's; the stage checks how much further: a few times
    as far, and this share of their norm. isolated: runs in an isolated process.
    label: of an artifact in tables, with {bits} and {group_size}.
    """

    help: str
    run: str | None
    bits: tuple[int, ...] = (4, 2, 3, 5, 6, 8)
    groups: tuple[int, ...] = GROUPS
    packages: tuple[str, ...] = ()
    adjustable: bool = False
    act_order: bool = False
    moved: float | None = None
    isolated: bool = False
    label: str = "{bits} bits/{group_size}"


_BLOCKS = (64, 128, 256)  # of bitsandbytes' 4-bit formats

METHODS = {
    "none": Method("keep the weights as they are", None, label="float"),
    "rtn": Method(
        "round to nearest, no calibration",
        "edgepress.pipeline.quantize.rtn:quantize",
        adjustable=True,
        label="rtn {bits} bits/{group_size}",
    ),
    "gptq": Method(
        "GPTQ, calibrated, one block in memory at a time",
        "edgepress.pipeline.quantize.gptq:quantize",
        adjustable=True,
        act_order=True,
        moved=0.5,  # twice inputs.MOVED: of some rows it may be more than of all
        isolated=True,  # all its memory is free again for the proof
        label="gptq {bits} bits/{group_size}",
    ),
    "gptqmodel": Method(
        "GPTQ through gptqmodel, the whole model in memory",
        "edgepress.pipeline.quantize.gptqmodel:quantize",
        bits=(4, 2, 3, 8),
        packages=("gptqmodel",),
        adjustable=True,
        act_order=True,
        moved=0.0,
        isolated=True,  # gptqmodel changes environment variables and patches libraries
        label="gptqmodel {bits} bits/{group_size}",
    ),
    "nf4": Method(
        "bitsandbytes NormalFloat 4 (small, but slow on CPU)",
        "edgepress.pipeline.quantize.bnb:quantize_4bit",
        bits=(4,),
        groups=_BLOCKS,
        packages=("bitsandbytes",),
        label="nf4",
    ),
    "fp4": Method(
        "bitsandbytes float 4 (small, but slow on CPU)",
        "edgepress.pipeline.quantize.bnb:quantize_4bit",
        bits=(4,),
        groups=_BLOCKS,
        packages=("bitsandbytes",),
        label="fp4",
    ),
    "int8": Method(
        "bitsandbytes LLM.int8 weights (outlier handling is lost)",
        "edgepress.pipeline.quantize.bnb:quantize_int8",
        bits=(8,),
        packages=("bitsandbytes",),
        label="int8",
    ),
}


# What QuantizeOptions and its messages are made from.
ADJUSTABLE = tuple(name for name, method in METHODS.items() if method.adjustable)
ACT_ORDER = tuple(name for name, method in METHODS.items() if method.act_order)
BITS = tuple(sorted({bits for method in METHODS.values() if method.run for bits in method.bits}))
GROUP_SIZES = tuple(sorted({size for method in METHODS.values() if method.run for size in method.groups}))


def joined(names: tuple[object, ...], word: str = "or") -> str:
    """``a, b or c``."""
    *first, last = map(str, names)
    return f"{', '.join(first)} {word} {last}" if first else last


def defaults_of_group_size() -> str:
    """The default group size, and the methods that differ: "128; nf4 and fp4 64"."""
    usual = GROUPS[0]
    others: dict[int, list[str]] = {}
    for name, method in METHODS.items():
        if method.groups[0] != usual:
            others.setdefault(method.groups[0], []).append(name)
    return "; ".join([str(usual), *(f"{joined(tuple(names), 'and')} {size}" for size, names in others.items())])
