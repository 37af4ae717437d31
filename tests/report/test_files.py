"""report.json and the files around it: what is written is read back, and what cannot be read is an error of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.report import model
from edgepress.pipeline.report.files import gather, save
from edgepress.pipeline.report.influence import influence_table, read_influences
from edgepress.pipeline.report.model import Figure
from made_up import PRUNED, WHOLE, a_report, an_original, content_of

EXAMPLE = Path(__file__).parents[2] / "docs" / "example"


def test_figure_keeps_samples_and_derives_percentiles() -> None:
    many = Figure.of("millisecond", [float(i) for i in range(101)])
    assert (many.median, many.percentiles[95], many.percentiles[99]) == (50, 95, 99) and len(many.values) == 101
    assert not Figure.of("second", [1.0, 2.0]).percentiles
    assert Figure.of("1", [0.5], 0.02).standard_error == 0.02
    with pytest.raises(ValueError, match="no values"):
        Figure.of("second", [])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = content_of(replace(PRUNED, original=an_original([20.0, 22.0])), replace(WHOLE, failed={"speed": "killed"}))
    model.write(content, tmp_path / "report.json")
    assert model.read(tmp_path / "report.json") == content
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["schema"] == 3 and written["compared_with"][0]["artifact"] == "whole" and "null" not in json.dumps(written)
    assert written["figures"]["speed.inter_token_ms"]["p95"] == PRUNED.figures["speed.inter_token_ms"].percentiles[95]
    assert written["original"]["dtype"] == "bfloat16" and "original" not in written["compared_with"][0]
    assert written["original"]["figures"]["speed.decode_tokens_per_s"] == {
        "unit": "token/second",
        "values": [20.0, 22.0],
        "median": 21.0,
    }
    assert written["figures"]["tasks.arc_easy.acc"]["standard_error"] == 0.02


def test_the_example_is_what_the_code_writes(tmp_path: Path) -> None:
    """Its tables, and its samples as they were measured."""
    content = model.read(EXAMPLE / "report.json")
    for name in ("report.json", "report.md"):
        save(content, tmp_path / name)
        assert (tmp_path / name).read_text() == (EXAMPLE / name).read_text()


DAMAGES = {
    "no figures": (lambda content: content.pop("figures"), "field `figures`"),
    "figures are a list": (lambda content: content.update(figures=[]), "report.figures: Expected `object`"),
    "a figure without values": (lambda content: content["figures"]["size.total_bytes"].pop("values"), "field `values`"),
    "a figure of nothing": (lambda content: content["figures"]["size.total_bytes"].update(values=[]), "no values"),
    "text for a number": (lambda content: content["stages"][0].update(bytes="many"), "bytes: Expected `int`, got `str`"),
    "a stage without perplexity": (lambda content: content["stages"][0].pop("perplexity"), "neither perplexity"),
    "a stage of no perplexity": (lambda content: content["stages"][0].update(perplexity=0), "has a perplexity of 0"),
    "no speed": (lambda content: content["figures"]["speed.decode_tokens_per_s"].update(values=[0] * 5), "is not above 0"),
    "no load of the original": (lambda content: content["original"]["figures"]["load.warm_s"].update(values=[0]), "is not above 0"),
    "no size": (lambda content: content["figures"].pop("size.total_bytes"), "size.total_bytes is missing"),
    "no processor": (lambda content: content["environment"].pop("cpu"), "field `cpu`"),
    "a step without its facts": (lambda content: content["steps"][0]["facts"].pop("removed_layers"), "field `removed_layers`"),
    "others that are none": (
        lambda content: content.update(compared_with=["whole"]),
        "compared_with[0]: Expected `object`",
    ),
    "a comparison without ratio": (lambda content: content["comparisons"][0].pop("ratio"), "field `ratio`"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_report_is_an_error_of_one_line(damage: Callable[[Any], object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    model.write(content_of(replace(PRUNED, original=an_original([20.0])), WHOLE), file)
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is damaged .* run edgepress bench again") as error:
        gather([tmp_path])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ['{"schema": 1, "figures": {}}', '{"schema": 2}', "{}"])
def test_a_report_of_another_version_is_measured_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="written by another edgepress; run edgepress bench again"):
        gather([tmp_path])


def test_influences_as_a_table(tmp_path: Path) -> None:
    """With the KL of layers that were tried alone, and of a file that is damaged one line."""
    layers = [{"layer": i, "influence": 0.5, "halves": [], "removed": i == 1} for i in range(2)]
    content = {"layers": layers, "rounds": [{"kl": {"1": 0.25}, "removed": 1}, {"sets": []}], "rank_correlation_of_halves": 0.9}
    file = tmp_path / "influence.json"
    file.write_text(json.dumps(content))
    lines = influence_table(read_influences(file)).splitlines()
    assert "KL when removed alone" in lines[0] and "0.2500" in lines[2] and lines[2].endswith("removed") and "0.90" in lines[-1]
    file.write_text("{}")
    with pytest.raises(InputError, match="field `layers`"):
        read_influences(file)


def test_gather_reads_reports_builds_and_artifacts(tmp_path: Path) -> None:
    """Each artifact once, comparisons kept, in any of the three formats."""
    build = tmp_path / "build"
    (build / "05-bench").mkdir(parents=True)
    (build / "04-export").mkdir()
    save(content_of(PRUNED, WHOLE), build / "05-bench" / "report.json")
    other = tmp_path / "other-bench"
    other.mkdir()
    (tmp_path / "other").mkdir()
    third = a_report("third", removed=[], size=1e7, kl=0.001, decode=80)
    save(content_of(replace(third, run="two")), other / "report.json")
    content = gather([build, build / "04-export", tmp_path / "other"])
    assert [r.artifact for r in content.reports] == ["pruned", "whole", "third"]
    for name in ("page.html", "page.md", "page.json"):
        save(content, tmp_path / name)
        assert "third" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "page.json").read_text())["comparisons"]
    with pytest.raises(OptionError, match=r"\.html, \.md or \.json"):
        save(content, tmp_path / "page.pdf")
    with pytest.raises(InputError, match="measure it first"):
        gather([tmp_path / "other-bench" / ".."])
