"""The first lines of a report, from made-up figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from edgepress.pipeline.report.comparison import losing
from edgepress.pipeline.report.html import html
from edgepress.pipeline.report.model import Figure, Report, StageRow
from edgepress.pipeline.report.steps import Step, describe
from edgepress.pipeline.report.text import markdown
from edgepress.pipeline.report.verdict import verdict
from made_up import PRUNED, WHOLE, a_report, content_of


def test_worthwhile_pruning_is_given_with_its_price() -> None:
    (first, *_) = verdict([PRUNED, WHOLE])
    assert "without 1 layer 12.5 % smaller and faster (decode 1.25x" in first and "KL 0.06 against 0.01" in first
    assert not losing(PRUNED, WHOLE)


@pytest.mark.parametrize(
    ("baseline", "says"),
    [
        (a_report("low", removed=[], size=6.9e6, kl=0.05, decode=90, bits=2), "is no larger (6.90 MB against 7.00 MB)"),
        (a_report("same", removed=[], size=9e6, kl=0.05, decode=125), "is no slower (pruned against it: decode 1x"),
    ],
    ids=["at equal size", "at equal speed"],
)
def test_pruning_that_loses_is_the_first_line(baseline: Report, says: str) -> None:
    (first, *_) = verdict([PRUNED, WHOLE, baseline])
    assert first.startswith("Pruning does not pay off") and says in first and baseline.artifact in first
    assert markdown(content_of(PRUNED, baseline)).splitlines()[4].startswith("- Pruning does not pay off")


def test_parts_of_blocks_are_named() -> None:
    """In the verdict, in the steps, and in the manifest's copy of the facts."""
    facts = {"removed_layers": [], "parts": "feed-forward", "removed_parts": [1, 2], "layers": [4, 4], "criterion": "healed"}
    steps = (Step("prune", {}, facts), *PRUNED.steps[1:])
    parts = replace(PRUNED, steps=steps)
    assert parts.removed == "feed-forward part of 2 layers" and parts.removed_layers == []
    (first, *_) = verdict([parts, WHOLE])
    assert "without feed-forward part of 2 layers 12.5 % smaller" in first and "the same with all layers whole" in first
    assert describe(steps[0]).startswith("prune: feed-forward part of 2 of 4 layers removed, numbers 1, 2 (")
    prune = Step("prune", {}, facts | {"influences": [0.5, 0.1, 0.02, 0.3]})
    assert "feed-forward part of layers 1, 2 removed" in html(content_of(replace(parts, steps=(prune, *steps[1:])), WHOLE))
    for kind in ("$x^$", "whole"):
        with pytest.raises(ValueError, match="nobody knows"):
            Step("prune", {}, facts | {"parts": kind})


def test_noise_is_no_proof_that_pruning_loses() -> None:
    """A wide interval shows neither that removal made it faster nor that it did not."""
    noisy = a_report("noisy", removed=[], size=9e6, kl=0.01, decode=120)
    decode = noisy.figures["speed.decode_tokens_per_s"]
    values = tuple(v * f for v, f in zip(decode.values, (0.5, 1.6, 0.9, 1.3, 0.7), strict=True))
    noisy = replace(noisy, figures=noisy.figures | {"speed.decode_tokens_per_s": replace(decode, values=values)})
    (first, *_) = verdict([PRUNED, noisy])
    assert "Pruning does not pay off" not in first and "no difference in speed shown" in first and "smaller" in first


def test_a_busy_machine_is_said_once() -> None:
    """Of reports of one run; what the build itself did before is no other program."""

    def at(load: float | None) -> list[Report]:
        return [replace(r, environment=replace(r.environment, load_average=load)) for r in (PRUNED, WHOLE)]

    (line,) = (line for line in verdict(at(12.0)) if "busy" in line)
    assert "load average 12 on 2 cores" in line
    assert not [line for load in (None, 2.3) for line in verdict(at(load)) if "busy" in line]


def test_pruning_without_a_baseline_claims_nothing() -> None:
    assert "nothing shows what removal is worth" in verdict([PRUNED])[0]


def test_crash_and_suspect_come_first() -> None:
    broken = replace(WHOLE, failed={"speed": "killed by the system"})
    odd = replace(PRUNED, stages=(PRUNED.stages[0], replace(PRUNED.stages[1], suspect="computes something else")))
    first, second, *_ = verdict([odd, broken])
    assert "could not be measured (speed): killed by the system" in first and "is suspect" in second


STAGES_DEGRADED = [
    ({"pruned": (45.0, 0.9), "onnx": (50.0, 0.1)}, "most of it where layers were removed: remove fewer or none"),
    ({"pruned'": (21.0, 0.1), "quantized'": (49.0, 0.8), "onnx": (50.0, 0.1)}, "most of it in quantization: give more bits"),
    ({"onnx_level_0": (21.0, 0.1), "onnx": (50.0, 0.9)}, "most of it by int8 activations: export with --accuracy-level 0"),
    ({"onnx_level_0": (50.0, 0.99), "onnx": (50.1, 0.01)}, "the checkpoints in between (--stages) would show where"),
    ({"onnx": (50.0, 1.0)}, "the checkpoints in between (--stages) would show where"),
]


@pytest.mark.parametrize(("stages", "says"), STAGES_DEGRADED, ids=[" ".join(stages) for stages, _ in STAGES_DEGRADED])
def test_a_model_that_is_of_no_use_is_named_first(stages: dict[str, tuple[float, float]], says: str) -> None:
    """However small and fast it is, and where that happened, if that was measured."""
    rows = [StageRow(name, 30_000_000, perplexity=p, share=share) for name, (p, share) in stages.items()]
    hurt = replace(PRUNED, stages=(PRUNED.stages[0], *rows))
    (first, second, *_) = verdict([hurt, WHOLE])
    assert first.startswith("pruned is badly degraded") and "perplexity 20 to 50" in first and says in first
    assert second.startswith("pruned: without 1 layer")
    assert not any("degraded" in line for line in verdict([PRUNED, WHOLE]))
    failed = replace(hurt, stages=(*hurt.stages[:-1], replace(rows[-1], failed="killed")))
    assert not any("degraded" in line for line in verdict([failed, WHOLE]))


def slow(fraction: float, read: float, level: int = 0, exporter: str = "fused") -> Report:
    report = a_report("a", removed=[], size=1e8, kl=0.01, decode=12.0)
    figures = report.figures | {
        "speed.bandwidth_fraction": Figure.of("1", [fraction]),
        "speed.bytes_per_token": Figure.of("byte", [read]),
    }
    export = Step("export", {}, {"exporter": exporter, "accuracy_level": level})
    return replace(report, figures=figures, steps=(*report.steps[:-1], export))


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (slow(0.03, 94e6), "--accuracy-level auto or 4"),
        (slow(0.03, 94e6, exporter="portable"), "the portable graph"),
        (slow(0.03, 94e6, level=4), "other programs were busy"),
    ],
)
def test_a_decode_rate_below_what_the_bytes_promise_is_called_out(report: Report, says: str) -> None:
    first = verdict([report])[0]
    assert "decodes at 3 % of the memory's bandwidth, 12 tokens/s where its bytes promise about 240" in first and says in first


def without_speed() -> Report:
    report = slow(0.03, 94e6)
    return replace(report, figures={k: v for k, v in report.figures.items() if k != "speed.decode_tokens_per_s"})


@pytest.mark.parametrize("report", [slow(0.4, 94e6), slow(0.03, 8e6), without_speed()], ids=["fast", "small", "no speed"])
def test_nothing_is_called_slow_that_is_not(report: Report) -> None:
    assert not any("bandwidth" in line for line in verdict([report]))
