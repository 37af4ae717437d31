"""Statistics, comparison, attribution, verdict and pages: from figures made up for the case, without measuring anything."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.pipeline.errors import InputError, OptionError
from edgepress.pipeline.report.attribution import attribute
from edgepress.pipeline.report.comparison import comparisons, labels, losing
from edgepress.pipeline.report.files import gather, save
from edgepress.pipeline.report.html import html
from edgepress.pipeline.report.stats import Measurement, Ratio, frontier, ratio
from edgepress.pipeline.report.tables import reports_of
from edgepress.pipeline.report.text import markdown, terminal
from edgepress.pipeline.report.verdict import times, verdict

# --- statistics


def test_interval_of_a_ratio_is_students() -> None:
    """Against scipy, which the project does without."""
    scipy_stats = pytest.importorskip("scipy.stats")
    ours, theirs = np.array([10.0, 11.0, 12.5, 9.5, 10.5]), np.array([9.0, 9.5, 9.0, 9.2, 8.8])
    logs = np.log(ours / theirs)
    low, high = scipy_stats.t.interval(0.99, 4, loc=logs.mean(), scale=logs.std(ddof=1) / math.sqrt(5))
    found = ratio(ours.tolist(), theirs.tolist())
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(logs.mean()), math.exp(low), math.exp(high)), rel=1e-4)
    assert found.rounds == 5


def test_verdict_is_never_guessed() -> None:
    """Noise, one round and equal samples show nothing; a steady lead does, in both directions."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        ours, theirs = np.exp(random.normal(0, 0.1, (2, 5)))
        wrong += ratio(ours.tolist(), theirs.tolist()).verdict("faster", "slower") != "no difference shown"
    assert wrong <= 12  # 1 % of 300 is expected
    assert ratio([2.0], [1.0]).verdict("faster", "slower") == "no difference shown"
    assert ratio([1.0] * 5, [1.0] * 5).verdict("faster", "slower") == "no difference shown"
    fast, slow = [1.25, 1.24, 1.26, 1.25, 1.23], [1.0, 1.01, 0.99, 1.0, 1.0]
    assert ratio(fast, slow).verdict("faster", "slower") == "faster"
    assert ratio(slow, fast).verdict("faster", "slower") == "slower"


def test_pairing_takes_out_what_both_met() -> None:
    """Rounds that differ threefold between each other hide nothing when both samples of a round share them."""
    rounds = np.array([1.0, 3.0, 0.8, 2.0, 1.5])
    assert ratio((1.1 * rounds).tolist(), rounds.tolist()).low > 1.09
    with pytest.raises(ValueError, match="do not pair"):
        ratio([1.0, 2.0], [1.0])


def test_measurement_keeps_samples_and_derives_percentiles() -> None:
    plain = Measurement("millisecond", [float(i) for i in range(101)]).plain()
    assert (plain["median"], plain["p95"], plain["p99"]) == (50, 95, 99) and len(plain["values"]) == 101
    assert "p99" not in Measurement("second", [1.0, 2.0]).plain()
    assert Measurement("1", [0.5], 0.02).plain()["standard_error"] == 0.02


def test_frontier() -> None:
    """Only what nothing else beats at its cost."""
    assert frontier([(1, 5), (2, 3), (3, 4), (4, 1), (2, 6)]) == [0, 1, 3]


def test_labels_differ() -> None:
    folders = [
        Path("/o/a/04-export"),
        Path("/o/b/04-export"),
        Path("/p/b/02-export"),
        Path("/o/a/04-export"),
        Path("/o/a/baseline/02-export"),
    ]
    assert labels(folders) == ["a", "o/b", "p/b", "a (2)", "baseline"]


# --- attribution


def rows_of(*losses: np.ndarray) -> list[dict[str, Any]]:
    names = ["original", "pruned", "quantized", "onnx_level_0", "onnx"]
    exact = {"onnx_level_0": "quantized"}
    return [
        {"name": n, "bytes": 100, "exact": exact.get(n), "perplexity": float(np.exp(x.mean()))}
        for n, x in zip(names, losses, strict=True)
    ]


def test_shares_sum_to_the_whole_loss() -> None:
    base = np.random.default_rng(0).uniform(1, 5, 1000)
    losses = [base, base + 0.3, base + 0.4, base + 0.4, base + 0.401]
    rows = rows_of(*losses)
    attribute(rows, [x.astype(np.float32) for x in losses])
    assert [round(row["share"], 3) for row in rows[1:]] == [0.748, 0.249, 0.0, 0.002]
    assert sum(row["share"] for row in rows[1:]) == pytest.approx(1)
    assert not any("suspect" in row for row in rows)


def test_an_export_that_computes_something_else_is_suspect() -> None:
    """Even when the mean loss is the same to many digits: gains and losses of tokens cancel there."""
    base = np.random.default_rng(0).uniform(1, 5, 1000)
    wave = 0.01 * np.tile([1.0, -1.0], 500)
    losses = [base, base + 0.3, base + 0.4, base + 0.4 + wave, base + 0.4 + wave]
    rows = rows_of(*losses)
    attribute(rows, list(losses))
    assert [row["name"] for row in rows if "suspect" in row] == ["onnx_level_0"]
    assert "quantized" in rows[3]["suspect"] and "damaged" in rows[3]["suspect"]


def test_failed_row_breaks_no_chain() -> None:
    base = np.ones(100)
    rows = rows_of(base, base, base + 0.5, base + 0.5, base + 0.5)
    attribute(rows, [base, None, base + 0.5, base + 0.5, base + 0.5])
    assert rows[2]["change_nats"] == pytest.approx(0.5) and "share" not in rows[1]


# --- verdict and pages


def a_report(name: str, *, removed: list[int], size: float, kl: float, decode: float, bits: int = 4) -> dict[str, Any]:
    """A report as bench writes it, five rounds."""
    noise = np.array([1.0, 1.01, 0.99, 1.005, 0.995])
    options = {"method": "gptq", "bits": bits, "group_size": 64, "head_bits": 8, "symmetric": False}
    prune = {"influences": [0.5, 0.1, 0.02, 0.3], "removed_layers": removed, "layers": [4, 4 - len(removed)]}
    figures = {
        "size.total_bytes": Measurement("byte", [size]),
        "memory.peak_rss_bytes": Measurement("byte", (1e8 * noise).tolist()),
        "speed.ttft_ms.32": Measurement("millisecond", (3 * noise).tolist()),
        "speed.decode_tokens_per_s": Measurement("token/second", (decode * noise * np.array([1, 1, 1.001, 1, 1])).tolist()),
        "speed.inter_token_ms": Measurement("millisecond", (1000 / decode * np.repeat(noise, 10)).tolist()),
        "quality.kl_mean": Measurement("nat", [kl]),
        "tasks.arc_easy.acc": Measurement("1", [0.3], 0.02),
    }
    return {
        "artifact": name,
        "identity": name,
        "run": "one",
        "environment": {
            "cpu": {"model": "a <chip>", "flags": ["avx2"]}, "cores": 2, "threads": 2, "provider": "CPUExecutionProvider",
            "system": "Linux", "python": "3.11", "versions": {"onnxruntime": "1"}, "date": "now", "command": "edgepress bench a b",
        },
        "steps": [
            *([{"stage": "prune", "options": {}, "facts": prune}] if removed else []),
            {"stage": "quantize", "options": options, "facts": {"head": {"lm_head": 8}}},
            {"stage": "export", "options": {}, "facts": {"exporter": "fused", "accuracy_level": 4}},
        ],
        "figures": {key: figure.plain() for key, figure in figures.items()},
        "stages": [
            {"name": "original", "bytes": 4e7, "perplexity": 20.0, "kl_mean": 0.0, "top1_agreement": 1.0, "tokens": 100},
            {"name": "onnx", "bytes": size, "perplexity": 20 * math.exp(kl), "kl_mean": kl, "top1_agreement": 0.9, "tokens": 100}
            | {"change_nats": kl, "share": 1.0},
        ],
        "missing": {"memory.gpu_bytes": "measured on the CPU"},
        "failed": {},
    }  # fmt: skip


def content_of(*reports: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 2} | reports[0] | {"beside": list(reports[1:]), "comparisons": comparisons(reports)}


PRUNED = a_report("pruned", removed=[2], size=7e6, kl=0.06, decode=125)
WHOLE = a_report("whole", removed=[], size=8e6, kl=0.01, decode=100)


def test_worthwhile_pruning_is_told_with_its_price() -> None:
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
def test_pruning_that_loses_is_the_first_line(baseline: dict[str, Any], says: str) -> None:
    (first, *_) = verdict([PRUNED, WHOLE, baseline])
    assert first.startswith("Pruning loses") and says in first and baseline["artifact"] in first
    assert markdown(content_of(PRUNED, baseline)).splitlines()[2].startswith("- Pruning loses")


def test_noise_is_no_proof_that_pruning_loses() -> None:
    """A wide interval shows neither that removal made it faster nor that it did not."""
    noisy = a_report("noisy", removed=[], size=9e6, kl=0.01, decode=120)
    values = noisy["figures"]["speed.decode_tokens_per_s"]["values"]
    noisy["figures"]["speed.decode_tokens_per_s"]["values"] = [
        v * f for v, f in zip(values, (0.5, 1.6, 0.9, 1.3, 0.7), strict=True)
    ]
    (first, *_) = verdict([PRUNED, noisy])
    assert "Pruning loses" not in first and "no difference in speed shown" in first and "smaller" in first


def test_pruning_without_a_baseline_claims_nothing() -> None:
    assert "nothing shows what removal is worth" in verdict([PRUNED])[0]


def test_other_runs_are_not_compared_in_speed() -> None:
    other = copy.deepcopy(WHOLE) | {"run": "two"}
    assert not comparisons([PRUNED, other]) and "speed not compared" in verdict([PRUNED, other])[0]


def test_crash_and_suspect_come_first() -> None:
    broken, odd = copy.deepcopy(WHOLE), copy.deepcopy(PRUNED)
    broken["failed"] = {"speed": "killed by the system"}
    odd["stages"][1]["suspect"] = "computes something else"
    found = verdict([odd, broken])
    assert "could not be measured (speed): killed by the system" in found[0] and "is suspect" in found[1]


STAGES_HURT = [
    ({"pruned": (45.0, 0.9), "onnx": (50.0, 0.1)}, "most of it where layers were removed: remove fewer or none"),
    ({"pruned'": (21.0, 0.1), "quantized'": (49.0, 0.8), "onnx": (50.0, 0.1)}, "most of it in quantization: give more bits"),
    ({"onnx_level_0": (21.0, 0.1), "onnx": (50.0, 0.9)}, "most of it to int8 activations: export with --accuracy-level 0"),
    ({"onnx_level_0": (50.0, 0.99), "onnx": (50.1, 0.01)}, "the checkpoints in between (--stages) would show where"),
    ({"onnx": (50.0, 1.0)}, "the checkpoints in between (--stages) would show where"),
]


@pytest.mark.parametrize(("stages", "says"), STAGES_HURT, ids=[" ".join(stages) for stages, _ in STAGES_HURT])
def test_a_model_that_is_of_no_use_any_more_is_told_first(stages: dict[str, tuple[float, float]], says: str) -> None:
    """However small and fast it is, and where that happened, if that was measured."""
    hurt = copy.deepcopy(PRUNED)
    rows = [{"name": name, "bytes": 3e7, "perplexity": p, "share": share} for name, (p, share) in stages.items()]
    hurt["stages"][1:] = rows
    (first, second, *_) = verdict([hurt, WHOLE])
    assert first.startswith("pruned is badly hurt") and "perplexity 20 to 50" in first and says in first
    assert second.startswith("pruned: without 1 layer")
    assert not any("hurt" in line for line in verdict([PRUNED, WHOLE]))
    rows[-1]["failed"] = "killed"
    assert not any("hurt" in line for line in verdict([hurt, WHOLE]))


def test_a_ratio_lies_in_its_interval() -> None:
    assert times(Ratio(1.0254, 1.0232, 1.0278, 5)) == "1.025x, 1.023 to 1.028"


def test_comparisons_say_which_is_faster() -> None:
    found = {c["figure"]: c for c in comparisons([PRUNED, WHOLE])}
    assert found["speed.decode_tokens_per_s"]["verdict"] == "slower" and found["speed.decode_tokens_per_s"][
        "ratio"
    ] == pytest.approx(0.8, rel=0.01)
    assert found["memory.peak_rss_bytes"]["verdict"] == "no difference shown"


def test_page_stands_alone() -> None:
    """Nothing is fetched, what a user may name is escaped, and every section is there."""
    page = html(content_of(PRUNED | {"artifact": "<b>mine</b>"}, WHOLE))
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", re.sub(r"xmlns(:xlink)?=\"[^\"]*\"", "", page))
    assert not re.search(r"@import|<script|<link|url\((?!#)", page)
    assert "<b>mine</b>" not in page and "&lt;b&gt;mine" in page and "a &lt;chip&gt;" in page
    assert page.count("<svg") >= 6 and "frontier" in page
    for part in (
        "Loss by stage",
        "Influence of each layer",
        "Memory and latency",
        "edgepress bench a b",
        "measured on the CPU",
        "arc_easy.acc",
    ):
        assert part in page
    assert "0.3" in page and "± 0.02" in page
    assert page == html(content_of(PRUNED | {"artifact": "<b>mine</b>"}, WHOLE))  # the same content, the same page


def test_markdown_and_terminal_tell_the_same() -> None:
    content = content_of(PRUNED, WHOLE)
    for text in (markdown(content), terminal(content)):
        for part in ("7.00 MB", "0.06 nat", "slower", "no difference shown"):
            assert part in text, part
    assert "**2: 0.02 (removed)**" in markdown(content)


def test_gather_reads_reports_builds_and_artifacts(tmp_path: Path) -> None:
    """Each artifact once, comparisons kept, in any of the three formats."""
    build = tmp_path / "build"
    (build / "05-bench").mkdir(parents=True)
    (build / "04-export").mkdir()
    (build / "05-bench" / "report.json").write_text(json.dumps(content_of(PRUNED, WHOLE)))
    other = tmp_path / "other-bench"
    other.mkdir()
    (tmp_path / "other").mkdir()
    (other / "report.json").write_text(
        json.dumps(content_of(a_report("third", removed=[], size=1e7, kl=0.001, decode=80) | {"run": "two"}))
    )
    content = gather([build, build / "04-export", tmp_path / "other"])
    assert [r["artifact"] for r in reports_of(content)] == ["pruned", "whole", "third"]
    for name in ("page.html", "page.md", "page.json"):
        save(content, tmp_path / name)
        assert "third" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "page.json").read_text())["comparisons"]
    with pytest.raises(OptionError, match=r"\.html, \.md or \.json"):
        save(content, tmp_path / "page.pdf")
    with pytest.raises(InputError, match="measure it first"):
        gather([tmp_path / "other-bench" / ".."])
    (other / "report.json").write_text('{"schema": 1, "figures": {}}')
    with pytest.raises(InputError, match="run edgepress bench again"):
        gather([other])
