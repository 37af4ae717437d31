"""`edgepress plan`, and what a bound on memory or speed chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from edgepress.pipeline import recipe
from edgepress.pipeline.artifact import Artifact
from edgepress.pipeline.errors import OptionError
from edgepress.pipeline.flags import make
from edgepress.pipeline.options import BoundOptions, ExportOptions, PlanOptions, QuantizeOptions, size_in_bytes
from edgepress.pipeline.plan import bounds as bounds_module
from edgepress.pipeline.plan import frontier as frontier_module
from edgepress.pipeline.plan import probes
from edgepress.pipeline.plan import speed as speed_module
from edgepress.pipeline.plan.bounds import Planned
from edgepress.pipeline.plan.frontier import bounds_of, frontier, table
from edgepress.pipeline.plan.speed import MEASURED, Speeds
from edgepress.pipeline.quantize import trials
from edgepress.pipeline.quantize.budget import Costs, Ends, Fit, fit
from edgepress.pipeline.quantize.head import EIGHT_BITS, FOUR_BITS, Head
from edgepress.pipeline.quantize.mix import FORMS, NATIVE, Form, Item, bytes_of
from edgepress.pipeline.report.forecast import Forecast, Point, Usage
from edgepress.pipeline.report.model import ReportFile, read
from edgepress.pipeline.report.text import markdown
from edgepress.pipeline.report.verdict import verdict
from families import TINY
from transformers import LlamaConfig


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little text, every size shown, nothing kept from elsewhere."""
    monkeypatch.setattr(trials, "TRIAL_TOKENS", 256)
    monkeypatch.setattr(trials, "COST_TOKENS", 512)
    monkeypatch.setattr(trials, "WINDOW", 32)
    monkeypatch.setattr(frontier_module, "USELESS", 1e9)
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))


def an_item(cost: float) -> Item:
    costs = {form: cost * 4.0 ** (4 - form.bits) for form in FORMS}
    return Item(("a",), 256 * 256, costs, {form: bytes_of(256, 256, form, symmetric=False) for form in FORMS})


COSTS = Costs(tuple(an_item(0.001 * (n + 1)) for n in range(20)), Ends(((1024, 256),), 10_000), {EIGHT_BITS: 0.0, FOUR_BITS: 0.1})
# 2 bits are slower than their bytes promise, 8 bits read prompts faster than 4, as kernels do
SPEEDS = Speeds({
    "2": Usage(0.004, 0.060, 100e6), "4": Usage(0.005, 0.070, 120e6), "8": Usage(0.008, 0.050, 180e6),
    "6": Usage(0.008, 0.050, 260e6),
    "head": Usage(0.0045, 0.071, 90e6),
}, 128)  # fmt: skip


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose costs and speeds are known."""
    monkeypatch.setattr(frontier_module, "costs_of", lambda *_: COSTS)
    monkeypatch.setattr(frontier_module, "speeds_of", lambda *_: SPEEDS)


def test_a_plan_shows_what_could_be_made(
    tiny: Path, quick: None, call: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From small to large, losses falling; a size that is proposed can be made; costs are measured once."""
    options = PlanOptions(method="rtn", max_size="1.1MB", speed=False)
    points = frontier(Artifact.load(tiny), options).points
    sizes, growths = [point.size for point in points], [point.growth for point in points]
    assert len(points) > 4 and sizes == sorted(sizes) and growths[0] > growths[-1] and growths == sorted(growths, reverse=True)
    assert [point.size <= 1.1e6 for point in points if point.asked] == [True]
    assert len(list((tmp_path / "cache" / "costs").iterdir())) == 1
    monkeypatch.setattr(trials, "Trial", None)  # what is kept needs no model
    result = call("plan", tiny, "--method", "rtn", "--max-size", "1.1MB", "--no-speed")
    assert result.code == 0 and result.out.count("--max-size") == len(points) and result.out.count("asked for") == 1
    assert "tokens/s" not in result.out
    refusal = call("plan", tiny, "--method", "rtn", "--max-size", "10KB", "--no-speed")
    assert refusal.code == 2 and "the smallest artifact of this model" in refusal.err
    next((tmp_path / "cache" / "costs").iterdir()).write_text("{}")
    with pytest.raises(TypeError):  # damaged: measured anew
        frontier(Artifact.load(tiny), options)


def test_what_was_measured_is_what_is_expected() -> None:
    """Of the artifacts that were measured; others lie between them, and more bytes of the same bits take longer."""

    def of(forms: list[Form], head: Head = EIGHT_BITS) -> Usage:
        return SPEEDS.of(COSTS, Fit(head, forms, 0.0, 0))

    for form in MEASURED:
        assert dataclasses.astuple(of([form] * 20)) == pytest.approx(dataclasses.astuple(SPEEDS.usages[str(form.bits)]))
    between = of([Form(4, 64), Form(8, 64)] * 10)
    assert dataclasses.astuple(between) == pytest.approx((0.0065, 0.060, 150e6), rel=1e-3)
    longer = of([Form(4, 32), Form(8, 64)] * 10)
    assert longer.decode_s > between.decode_s and (longer.memory or 0) > (between.memory or 0)
    head = of([Form(4, 64)] * 20, FOUR_BITS)
    assert dataclasses.astuple(head) == pytest.approx(dataclasses.astuple(SPEEDS.usages["head"]))
    three, four, five = (of([Form(bits, 64)] * 20) for bits in (3, 4, 5))
    assert three.memory == pytest.approx((four.memory or 0) + 40e6, rel=5e-3)  # half of what planes of 6 bits take to load
    assert five.memory == pytest.approx(260e6, rel=5e-3) and five.decode_s == pytest.approx(0.008, rel=5e-3)
    both = of([Form(8, 64)] * 20, FOUR_BITS)  # a head of few bits does the same beside other blocks
    assert dataclasses.astuple(both) == pytest.approx((0.0075, 0.051, 150e6))


@pytest.mark.parametrize(
    ("bounds", "figure"),
    [
        ({"min_speed": 150}, lambda usage: usage.decode_s <= 1 / 150),
        ({"max_memory": "150MB"}, lambda usage: (usage.memory or 0) <= 150e6),
        ({"max_ttft": 60}, lambda usage: usage.ttft_s <= 0.060),
        ({"max_memory": "170MB", "min_speed": 130}, lambda usage: (usage.memory or 0) <= 170e6 and usage.decode_s <= 1 / 130),
    ],
)
def test_the_least_loss_that_keeps_to_the_bounds(known: None, tiny: Path, bounds: dict, figure: Callable) -> None:
    found = frontier(Artifact.load(tiny), PlanOptions(method="rtn", **bounds))
    asked = found.asked
    assert asked is not None and asked.usage is not None and figure(asked.usage)
    better = [point for point in found.points if point.growth < asked.growth]
    assert all(asked.growth <= point.growth for point in found.points if point.usage and figure(point.usage))
    assert all(point.usage is not None and not figure(point.usage) for point in better)
    assert bool(better) != ("max_ttft" in bounds)  # 8 bits read prompts fastest here


def test_a_size_and_a_bound(known: None, tiny: Path) -> None:
    """Both are kept to."""
    for size, bound in (("900KB", {"min_speed": 130}), ("1.4MB", {"min_speed": 200})):
        asked = frontier(Artifact.load(tiny), PlanOptions(method="rtn", max_size=size, **bound)).asked
        assert asked is not None and asked.usage is not None
        assert asked.size <= float(size[:-2]) * (1e6 if "MB" in size else 1e3) and 1 / asked.usage.decode_s >= bound["min_speed"]


def test_a_loose_bound_leaves_the_bits_between(known: None, tiny: Path, tmp_path: Path) -> None:
    """They lose least for their bytes, so a size decides for them, and a speed that no mix of theirs has against them."""
    for speed, native in ((100, False), (220, True)):
        options = PlanOptions(method="rtn", max_size="950KB", min_speed=speed)
        asked = frontier(Artifact.load(tiny), options).asked
        assert asked is not None and asked.native == native
        bounds, rest = recipe.split_bounds({"min_speed": str(speed)})
        steps = [("quantize", make(QuantizeOptions, rest)), ("export", ExportOptions())]
    (_, sized), _ = recipe._keeping_to(bounds, Artifact.load(tiny), tmp_path, steps)[0]
    assert isinstance(sized, QuantizeOptions) and sized.native_bits  # the build makes what was planned
    assert not frontier(Artifact.load(tiny), PlanOptions(method="rtn", max_size="950KB", native_bits=False)).asked.native  # type: ignore[union-attr]
    assert frontier(Artifact.load(tiny), PlanOptions(method="rtn", max_size="950KB", native_bits=True)).asked.native  # type: ignore[union-attr]


def test_bounds_that_nothing_keeps_to(known: None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is named, with what comes nearest."""
    for bounds, named in (
        ({"min_speed": 900}, "--min-speed"),
        ({"max_memory": "20MB"}, "--max-memory"),
        ({"max_ttft": 5}, "--max-ttft"),
        ({"min_speed": 240, "max_ttft": 52}, "--m"),
    ):
        with pytest.raises(OptionError, match=f"keeps to {named}.*nearest is one of .* MB: .*tokens/s.*ask for less"):
            frontier(Artifact.load(tiny), PlanOptions(method="rtn", **bounds))
    silent = dataclasses.replace(SPEEDS, usages={k: dataclasses.replace(c, memory=None) for k, c in SPEEDS.usages.items()})
    monkeypatch.setattr(frontier_module, "speeds_of", lambda *_: silent)
    with pytest.raises(OptionError, match="does not report the memory"):
        frontier(Artifact.load(tiny), PlanOptions(method="rtn", max_memory="150MB"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--min-speed", "30", "--bits", "4"), "--min-speed chooses the bits of every matrix itself; leave --bits out"),
        (("--max-memory", "1GB", "--max-growth", "0.1"), "--max-memory chooses the bits of every matrix itself"),
        (("--max-ttft", "100", "--target", "cuda"), "--max-ttft is of this machine's CPU"),
        (("--max-ttft", "100", "--head-bits", "4"), "--max-ttft chooses the bits of every matrix itself; leave --head-bits out"),
        (("--max-memory", "lots"), "--max-memory takes a size"),
        (("--min-speed", "0"), "--min-speed must be above 0"),
        (("--min-speed", "30", "--method", "nf4"), "nf4 has none to choose; leave --method out"),
        (("--min-speed", "30", "--exporter", "portable", "--cache", "int8"), "--cache int8 is of the fused graph"),
    ],
)
def test_bounds_that_contradict(tiny: Path, tmp_path: Path, call: Callable, flags: tuple[str, ...], reason: str) -> None:
    result = call("build", tiny, tmp_path / "out", *flags)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rare_tokens_may_keep_their_bits_under_a_bound(known: None, tiny: Path, tmp_path: Path) -> None:
    """The one thing about the head that a bound leaves to the user; what is planned and what is built know of it."""
    bounds, rest = recipe.split_bounds({"min_speed": "1", "rare_rows": ["none"]})
    quantize, export = make(QuantizeOptions, rest), ("export", ExportOptions())
    (_, sized), _ = recipe._keeping_to(bounds, Artifact.load(tiny), tmp_path, [("quantize", quantize), export])[0]
    assert isinstance(sized, QuantizeOptions) and sized.rare_rows == ("none",) and sized.max_size
    assert PlanOptions(rare_rows=("none",)).quantize().rare_rows == ("none",)
    with pytest.raises(OptionError, match="leave --rare-rows out"):
        recipe.split_bounds({"min_speed": "1", "rare_rows": ["64-99"]})
    rows = ("quantize", QuantizeOptions(rare_rows=("64-99",)))
    with pytest.raises(OptionError, match="leave one of them out"):
        recipe._keeping_to(bounds, Artifact.load(tiny), tmp_path, [rows, export])


def test_a_recipe_that_contradicts_a_bound(tiny: Path, tmp_path: Path, call: Callable) -> None:
    """As a flag would."""
    for stage, reason in (
        ("quantize: {bits: 8}\nexport: {}", "the recipe gives bits"),
        ("quantize: {}\nexport: {target: cuda}", "the target is cuda"),
        ("export: {}", "a recipe with quantize and export"),
    ):
        (tmp_path / "recipe.yaml").write_text(stage)
        result = call("build", tiny, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--min-speed", "1")
        assert result.code == 2 and reason in result.err, result.err


def test_a_narrow_band_between_two_bounds(known: None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of the dozen keeps to both, those between the nearest are tried; and the best of them all is taken."""
    monkeypatch.setattr(frontier_module, "POINTS", 3)
    asked = frontier(Artifact.load(tiny), PlanOptions(method="rtn", min_speed=148, max_ttft=62)).asked
    assert asked is not None and asked.usage is not None
    assert asked.usage.decode_s <= 1 / 148 and asked.usage.ttft_s <= 0.062
    monkeypatch.setattr(frontier_module, "POINTS", 12)
    sizes: dict[int, list[int]] = {}
    for halvings in (0, 5):  # bytes that a bound leaves are used
        monkeypatch.setattr(frontier_module, "HALVINGS", halvings)
        asked = [frontier(Artifact.load(tiny), PlanOptions(min_speed=speed)).asked for speed in (130, 140, 160, 180)]
        sizes[halvings] = [point.size for point in asked if point]
    assert all(fine >= coarse for fine, coarse in zip(sizes[5], sizes[0], strict=True)) and sum(sizes[5]) > sum(sizes[0])


@pytest.mark.parametrize("speed", [126, 129, 140, 155, 171, 200, 222, 243])
def test_what_was_planned_is_found_again(speed: float, known: None, tiny: Path, tmp_path: Path) -> None:
    """The size that is said and that quantize is given makes the artifact that keeps to the bound, to the byte."""
    options = PlanOptions(method="rtn", min_speed=speed)
    for _ in range(2):  # chosen, and read back
        found = bounds_module.planned(Artifact.load(tiny), options, ExportOptions(), tmp_path / "plan.json")
    again = fit(COSTS, size_in_bytes(found.max_size, "--max-size"), NATIVE)
    assert again.size == found.point.size and SPEEDS.of(COSTS, again) == found.point.usage
    line = next(line for line in table(frontier(Artifact.load(tiny), options)).splitlines() if "asked for" in line)
    assert f"--max-size {found.max_size} --native-bits " in line  # least loss at a speed: what it reads is what it has


@pytest.mark.parametrize("context", [32, 512])
def test_five_artifacts_are_measured(
    context: int, random_model: Callable, text: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, once; a model of a short context is read a shorter prompt."""
    source = Artifact.load(random_model(LlamaConfig(**TINY | {"max_position_embeddings": context}), tmp_path / "model"))
    monkeypatch.setattr(probes, "ROUNDS", 1)
    options = PlanOptions(method="rtn", text=text)
    speeds = speed_module.speeds_of(source, options, ExportOptions())
    assert set(speeds.usages) == {"2", "4", "6", "8", "head"} and speeds.prompt == min(128, context // 2)
    assert all(cost.decode_s > 0 and cost.ttft_s > 0 and (cost.memory or 1e9) > 1e7 for cost in speeds.usages.values())
    monkeypatch.setattr(speed_module, "_measure", None)
    assert speed_module.speeds_of(source, options, ExportOptions()) == speeds
    with pytest.raises(TypeError):  # another graph has other speeds
        speed_module.speeds_of(source, options, ExportOptions(accuracy_level="0"))


def test_what_is_measured_beside_other_work_is_not_kept(
    tiny: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not for the next plan; a build goes on with it, and says how to choose anew. What was kept stays as good."""
    measured: list[int] = []
    monkeypatch.setattr(speed_module, "_measure", lambda *_: measured.append(1) or SPEEDS)
    monkeypatch.setattr(frontier_module, "costs_of", lambda *_: COSTS)
    options, source = PlanOptions(method="rtn", min_speed=130), Artifact.load(tiny)
    for number, (load, file, times, lasting) in enumerate((
        (99.0, "one", 1, False), (0.1, "one", 1, False), (0.1, "two", 2, True), (99.0, "two", 2, True), (99.0, "three", 2, True),
    )):  # fmt: skip
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        found = bounds_module.planned(source, options, ExportOptions(), tmp_path / f"{file}.json")
        assert found.point.asked and len(measured) == times and found.lasting == lasting
        assert (tmp_path / "cache" / "speeds").exists() == (number > 1)
    assert caplog.text.count("not kept for the next time") == 1
    assert caplog.text.count("one.json to make it anew") == 1


def test_a_bound_that_is_missed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """By how much, as measured, on the terminal and in the report's first lines; and that what is kept to is kept to."""
    file = Path(__file__).parents[2] / "docs" / "example" / "report.json"
    first = read(file).first
    speed = first.figures["speed.decode_tokens_per_s"].median
    point = Point(10**7, 10**7, 5.0, 8, 0.01, Usage(1 / speed, 0.05, 9e7), asked=True)
    caplog.set_level("INFO", "edgepress")

    def said(prompt: int = 128, **bounds: object) -> str:
        forecast = Forecast((point,), prompt, bounds_of(BoundOptions(**bounds), prompt))
        caplog.clear()
        bounds_module.compare(Planned("", forecast), file)
        shown = dataclasses.replace(first, forecast=forecast)
        findings = [line for line in verdict([shown]) if "--m" in line]
        assert findings and all((line in caplog.text) == ("keeps to" not in line) for line in findings)
        page = markdown(ReportFile((shown,)))
        assert page.count("| expected, chosen | 10.0 MB | 5.00 | 8 | +1.0 % |") == 1 and "| measured |" in page
        return caplog.text + " ".join(findings)

    assert "+1.0 % of perplexity; measured" in (kept := said(min_speed=0.5 * speed, max_memory="900GB"))
    assert "warning" not in kept and f"keeps to --max-memory 900GB and --min-speed {0.5 * speed:g}" in kept
    assert "warning" not in said(min_speed=1.009 * speed)  # two measurements differ by more
    assert "misses --min-speed" in (missed := said(min_speed=2 * speed, max_memory="900GB")) and "by 100 %" in missed
    assert "misses --max-memory" not in missed
    unmeasured = said(77, min_speed=2 * speed, max_ttft=1.0, max_memory="1MB")
    assert "misses --min-speed" in unmeasured and "nothing measured what --max-ttft 1 bounds" in unmeasured
    assert "misses --max-memory 1MB" in unmeasured and "of prompts of up to" in unmeasured


def test_no_speed_and_a_bound() -> None:
    with pytest.raises(OptionError, match="--no-speed measures nothing"):
        PlanOptions(min_speed=30, speed=False)
    assert not BoundOptions().given and BoundOptions(max_ttft=1.0).given


@pytest.mark.families
def test_a_build_that_keeps_to_a_bound(
    tiny: Path, text: Path, tmp_path: Path, call: Callable, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four artifacts are measured once; what is chosen stands in plan.json, and the same command keeps all that is done."""
    monkeypatch.setattr(probes, "ROUNDS", 1)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    given = ("build", tiny, tmp_path / "out", "--min-speed", "1", "--method", "rtn", "--remove-count", "1", "--no-baseline",
             "--repeats", "2", "--text", text, "--text-tokens", "256", "--calibration", text, "--no-original-speed")  # fmt: skip
    first = call(*given)
    assert first.code == 0, first.err
    assert "plan: --max-size" in first.err and "measured" in first.err
    assert len(list((tmp_path / "cache" / "speeds").iterdir())) == 1
    report = read(tmp_path / "out" / "05-bench" / "report.json").first
    assert report.forecast is not None and report.forecast.asked is not None and len(report.forecast.points) > 3
    page = (tmp_path / "out" / "05-bench" / "report.html").read_text()
    assert "keeps to --min-speed 1" in page and 'id="planned"' in page and "expected, chosen" in page
    monkeypatch.setattr(speed_module, "_measure", None)
    again = call(*given)
    assert again.code == 0 and again.err.count("already done") >= 4 and "what every matrix costs" not in again.err
    result = call("plan", tiny, "--method", "rtn", "--calibration", text, "--text", text, "--min-speed", "1")
    assert result.code == 0 and "tokens/s" in result.out and result.out.count("asked for") == 1
