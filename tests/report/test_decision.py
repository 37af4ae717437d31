"""What a report says to ship, from made-up figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from edgepress.pipeline.report.decision import decision
from edgepress.pipeline.report.html import html
from edgepress.pipeline.report.model import Figure, Report
from edgepress.pipeline.report.steps import Step
from edgepress.pipeline.report.text import markdown, terminal
from made_up import PRUNED, WHOLE, a_report, an_original, content_of

LARGE = a_report("large", removed=[], size=9e6, kl=0.001, decode=80, bits=8)
POOR = a_report("poor", removed=[2], size=5e6, kl=0.2, decode=150)
RUINED = a_report("ruined", removed=[1, 2], size=4e6, kl=0.6, decode=200)


def test_the_smallest_that_loses_little_is_shipped() -> None:
    """Not the smallest of all, and not the one that loses least."""
    assert (
        decision([LARGE, WHOLE, POOR])
        == (
            "Ship whole: 8.00 MB, perplexity +1.0 %; the smallest here that loses at most 5 %. large where speed matters more"
        ).partition(". large")[0]
    )


def test_a_faster_one_is_named_where_it_is_shown_to_be() -> None:
    quick = a_report("quick", removed=[], size=8.5e6, kl=0.01, decode=140)
    told = decision([WHOLE, quick])
    assert told.startswith("Ship whole: ") and ". quick where speed matters more: decode 1.4x, " in told
    assert told.endswith("8.50 MB, perplexity +1.0 %")
    other_run = replace(quick, run="another")
    assert "quick" not in decision([WHOLE, other_run])


def test_where_all_lose_much_the_best_is_named_with_its_price() -> None:
    told = decision([POOR, PRUNED])
    assert told == (
        "Ship pruned only where size or speed matter more than quality: 7.00 MB, perplexity +6.2 %; all others lose more"
    )
    assert decision([POOR]).endswith("5.00 MB, perplexity +22.1 %")


def test_who_can_run_the_file_that_it_was_made_from_is_told() -> None:
    """One of few bits that is smaller loses nothing, being the original; one of 8 bits or a larger one is no rival."""
    for size, types, told in ((6_000_000, ["Q4_K"], True), (9_000_000, ["Q4_K"], False), (6_000_000, ["Q8_0"], False)):
        made = Step("import", facts={"file_bytes": size, "quantized_types": types})
        for report, otherwise in ((WHOLE, "Ship whole: 8.00 MB"), (PRUNED, "Ship pruned only where size")):
            said = decision([replace(report, steps=(made, *report.steps))])
            assert (" where ONNX is needed (the GGUF file, which is the original here, has 6.00 MB): " in said) == told
            assert said.startswith(otherwise) != told


def test_prompts_that_are_read_slower_are_told() -> None:
    """A reader of the first line alone would take decoding for all; nothing is said where the rounds do not show it."""

    def rate(*values: float) -> dict[str, Figure]:
        return {"speed.prefill_tokens_per_s.128": Figure.of("token/second", list(values))}

    original = an_original([20.0, 20.2, 19.8])
    for theirs, told in ((rate(100, 101, 99), True), (rate(60, 61, 59), False), (rate(50, 90, 70), False)):
        beside = replace(original, figures=original.figures | theirs)
        said = decision([replace(WHOLE, original=beside, figures=WHOLE.figures | rate(70, 71, 69))])
        assert (", reads a prompt of 128 tokens 0.7 times as fast, at 20 % of its memory" in said) == told, said


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        ([0.5], "200 times the decode rate of the original under transformers (one round: no interval), at 20 % of its memory"),
        (
            [20.0, 20.2, 19.8],
            "decodes 5 times as fast as the original under transformers (99 % interval 4.99 to 5.02), at 20 % of its memory",
        ),
        ([20.0], "5 times the decode rate of the original under transformers (one round: no interval), at 20 % of its memory"),
        (
            [200.0, 202.0, 198.0],
            "decodes 0.5 times as fast as the original under transformers (99 % interval 0.499 to 0.502), at 20 % of its memory",
        ),
        (
            [90.0, 101.0, 110.0],
            "1 times the decode rate of the original under transformers (99 % interval 0.549 to 1.82), at 20 % of its memory",
        ),
        ([3.0, 20.0], "times the decode rate of the original under transformers (2 rounds: too few for an interval), at"),
    ],
)
def test_what_is_won_over_the_original_is_told(decode: list[float], says: str) -> None:
    """Paired with the rounds that the original took part in; claimed only where the interval shows it."""
    told = decision([replace(WHOLE, original=an_original(decode))])
    assert told.startswith("Ship whole: 8.00 MB, perplexity +1.0 %, ") and says in told
    assert decision([WHOLE]) == "Ship whole: 8.00 MB, perplexity +1.0 %"


def test_what_was_pruned_in_vain_is_not_shipped() -> None:
    """As large as another with all of its layers that loses less: the verdict says so, and the decision goes by it."""
    vain = a_report("vain", removed=[2], size=7.95e6, kl=0.03, decode=100)
    assert decision([vain, WHOLE]).startswith("Ship whole: ")


def test_what_is_unfit_is_not_shipped() -> None:
    """Ruined, of suspect files, or not measured: however small."""
    suspect = replace(WHOLE, stages=(WHOLE.stages[0], replace(WHOLE.stages[1], suspect="computes something else")))
    failed = replace(WHOLE, failed={"speed": "killed by the system"})
    for unfit in (RUINED, suspect, failed):
        assert decision([unfit]) == f"Do not ship {unfit.artifact}"
        assert decision([unfit, LARGE]).startswith("Ship large: ")
    assert decision([RUINED, suspect]).startswith("Ship none of these")


def test_without_an_original_nothing_is_said() -> None:
    def alone(report: Report) -> Report:
        return replace(report, stages=report.stages[1:])

    assert decision([alone(WHOLE), alone(PRUNED)]) == ""
    assert "Ship" not in markdown(content_of(alone(WHOLE)))


def test_it_stands_first_everywhere() -> None:
    content = content_of(WHOLE, LARGE)
    line = decision([WHOLE, LARGE])
    assert terminal(content).startswith(line) and markdown(content).splitlines()[2] == f"**{line}**"
    page = html(content)
    assert page.index(line) < page.index('<ul class="verdict">')
