"""The choice of a form for every matrix: optimal, within its bound, and said in rules that mean it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from edgepress.pipeline.options import QuantizeOptions, bits_rules
from edgepress.pipeline.quantize.mix import (
    BASE,
    EIGHT,
    FORMS,
    HEAD_GROUP,
    Form,
    Item,
    by_matrix,
    bytes_of,
    mean_bits,
    rules_of,
    solve,
    usual_form,
)
from edgepress.pipeline.quantize.plan import exceptions_of
from edgepress.pipeline.quantize.rtn import round_to_nearest

CHOICES = (Form(4, 32), BASE, EIGHT)


def items(count: int = 6, seed: int = 0) -> list[Item]:
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        weights = int(generator.integers(1, 9)) * 4096
        scale = float(generator.lognormal())
        cost = {form: scale * 4.0 ** (4 - form.bits) * form.group_size**0.3 for form in FORMS}
        made.append(
            Item(
                (f"m.{index}.a", f"m.{index}.b"), weights, cost, {form: bytes_of(64, weights // 64, form, False) for form in FORMS}
            )
        )
    return made


def total(chosen: tuple[Form, ...] | list[Form], made: list[Item], what: str) -> float:
    return sum(getattr(item, what)[form] for item, form in zip(made, chosen, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_is_better(seed: int) -> None:
    made = items(seed=seed)
    every = list(itertools.product(CHOICES, repeat=len(made)))
    for share in (0.2, 0.5, 0.8):
        size = (1 - share) * total([Form(4, 64)] * 6, made, "bytes") + share * total([EIGHT] * 6, made, "bytes")
        best = min(total(one, made, "costs") for one in every if total(one, made, "bytes") <= size)
        chosen = solve(made, CHOICES, size=size)
        assert total(chosen, made, "bytes") <= size
        assert total(chosen, made, "costs") == pytest.approx(best, rel=2e-3)
        cost = total(chosen, made, "costs")
        smallest = min(total(one, made, "bytes") for one in every if total(one, made, "costs") <= cost * (1 + 1e-9))
        assert total(solve(made, CHOICES, cost=cost), made, "bytes") == pytest.approx(smallest, rel=2e-3)


def test_what_rules_do_not_name_has_the_blocks_of_the_head() -> None:
    """The flags of a mix hold for the head, too, however few weights have its blocks."""
    made = [Item((f"m.{index}.a",), weights, {}, {}) for index, weights in enumerate((50, 40, 30, 30))]
    assert usual_form([Form(4, 32), Form(4, 32), EIGHT, EIGHT], made) == EIGHT
    assert usual_form([BASE, Form(4, 32), EIGHT, Form(4, 128)], made) == BASE
    assert usual_form([Form(4, 32)] * 4, made).group_size == HEAD_GROUP


def test_a_bound_that_nothing_keeps_to_gets_what_comes_nearest() -> None:
    made = items()
    assert solve(made, CHOICES, cost=0.0) == [EIGHT] * 6
    assert solve(made, CHOICES, size=1.0) == [BASE] * 6


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [64, 96, 160])
def test_bytes_are_those_of_the_packed_matrix(form: Form, columns: int, symmetric: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(8, columns)).astype(np.float32)
    assert bytes_of(8, columns, form, symmetric) == round_to_nearest("m", weight, *form, symmetric).nbytes


def test_rules_give_every_matrix_its_form() -> None:
    names = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]
    generator = np.random.default_rng(1)
    forms = {name: CHOICES[generator.integers(3)] for name in names}
    rules = rules_of(forms, BASE)
    assert len(rules) <= 6
    options = QuantizeOptions(method="rtn", bits=4, group_size=64, bits_for=rules)
    assert exceptions_of(options, names) == {name: form for name, form in forms.items() if form != BASE}
    assert [rule.group_size for rule in bits_rules(("a=8", "b=8/32"))] == [None, 32]


def test_mean_bits_counts_scales_and_zero_points() -> None:
    made = items()
    assert mean_bits(made, [EIGHT] * 6) == pytest.approx(8 + (16 + 8) / 64)
    assert by_matrix(made, [EIGHT] * 6) == {name: EIGHT for item in made for name in item.names}


def test_the_solver_prints_nothing() -> None:
    """HiGHS writes lines about its solutions that no option turns off; what a command prints is for other programs.

    It writes through the C library, which keeps lines back when they go into a pipe.
    """
    program = """if True:
        import ctypes
        from edgepress.pipeline.quantize.mix import _nothing_printed
        print("before")
        with _nothing_printed():
            ctypes.CDLL(None).printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution\\n")
        print("after")
    """
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=buffered, check=True)
    assert done.stdout == "before\nafter\n"
