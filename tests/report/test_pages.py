"""Pages, tables and text, from made-up figures."""

from __future__ import annotations

import re
from dataclasses import replace

from edgepress.pipeline.report.html import html
from edgepress.pipeline.report.model import Answer, Figure, Parting
from edgepress.pipeline.report.steps import Step, describe
from edgepress.pipeline.report.tables import artifact_rows, figure_rows, made_by
from edgepress.pipeline.report.text import markdown, terminal
from made_up import PRUNED, WHOLE, an_original, content_of


def test_page_stands_alone() -> None:
    """Nothing is fetched, what a user may name is escaped, and every section is there."""
    page = html(content_of(replace(PRUNED, artifact="<b>mine</b>"), WHOLE))
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
    assert page == html(content_of(replace(PRUNED, artifact="<b>mine</b>"), WHOLE))  # the same content, the same page


def test_markdown_and_terminal_show_the_same() -> None:
    content = content_of(PRUNED, WHOLE)
    for text in (markdown(content), terminal(content)):
        for part in ("7.00 MB", "0.06 nat", "slower", "no difference shown"):
            assert part in text, part
    assert "**2: 0.02 (removed)**" in markdown(content)


def test_an_answer_says_whether_a_near_tie_led_it_elsewhere() -> None:
    """Both pages and the terminal, beside the artifact's answer; nothing where the answers are the same."""
    told = replace(WHOLE, answers=(Answer("2 + 2?", "The sum is 4.", "This is 4.", Parting("The", "This", 0.151, 0.144)),))
    content = content_of(
        told, replace(PRUNED, answers=(Answer("2 + 2?", "The sum is 4.", "Two.", Parting("The", "Two", 0.151, 0.0)),))
    )
    for text in (markdown(content), terminal(content), html(content).replace("&#34;", '"')):
        assert 'This is 4. (it parts from the original where that gives "The" 15 % and "This" 14 %)' in text
        assert 'Two. (it parts from the original where that gives "The" 15 % and "Two" less than 1 %)' in text
    assert "parts from" not in terminal(content_of(replace(WHOLE, answers=(Answer("2 + 2?", "4.", "4."),))))


def test_the_text_is_named() -> None:
    named = replace(WHOLE, text="mine.txt", figures=WHOLE.figures | {"quality.tokens": Figure.of("token", [7905])})
    assert made_by(named)[-1] == "quality: on 7,905 tokens of mine.txt" and made_by(WHOLE)[-1].startswith("export")
    for page in (markdown(content_of(named)), html(content_of(named))):
        assert "quality: on 7,905 tokens of mine.txt" in page


def test_a_mix_is_described_by_its_mean() -> None:
    """What most of its matrices have may be what the fewer weights have."""
    options = {"method": "gptq", "bits": 8, "group_size": 64, "bits_for": [".*up_proj=4/32"]}
    told = describe(Step("quantize", options, {"bits_per_weight": 6.164, "head": "float"}))
    assert told == "quantize: gptq, a mix of 6.2 bits a weight, asymmetric; head float"
    assert "8 bits, groups of 64, others for some matrices" in describe(Step("quantize", options, {"head": "float"}))


def test_headers_are_the_fields_terms() -> None:
    header = artifact_rows([PRUNED, WHOLE])[0]
    assert header[-4:] == ["decode, tokens/s", "TTFT @32", "peak RSS", "Pareto-optimal in"]
    assert artifact_rows([PRUNED])[0][-1] == "peak RSS"  # one alone is the best of its kind, which says nothing
    assert {"peak RSS", "TTFT @32", "decode throughput", "inter-token latency"} <= {row[0] for row in figure_rows(PRUNED)}


def test_the_original_stands_in_the_table_with_what_was_measured_of_it() -> None:
    """Its weights alone where its speed was not."""
    header, row, *_ = artifact_rows([WHOLE, PRUNED])
    assert row[1] == "original (weights)" and dict(zip(header, row, strict=True))["peak RSS"] == ""
    ran = replace(WHOLE, original=an_original([20.0, 22.0, 21.0]))
    header, row, *_ = artifact_rows([ran])
    cells = dict(zip(header, row, strict=True))
    assert cells["artifact"] == "original (torch, bfloat16)" and cells["size on disk"] == "40.00 MB"
    assert [cells[name] for name in ("decode, tokens/s", "TTFT @32", "peak RSS")] == ["21", "21 ms", "500.00 MB"]
    content = content_of(ran)
    assert "original (torch, bfloat16)" in terminal(content)
    for page in (markdown(content), html(content)):
        assert page.count("original (torch, bfloat16)") == 2 and "20 tokens/s to 22 tokens/s, 3 samples" in page


def test_cells_of_a_broad_table_know_their_column() -> None:
    """On a phone each stands in a line of its own, where no header is above it."""
    page = html(content_of(WHOLE))
    assert '<td data-label="peak RSS">100.00 MB</td>' in page and '<td data-label="median">' not in page


def test_labels_come_from_the_table_of_methods() -> None:
    """An unknown method, of another version's report, is shown by its name."""
    assert PRUNED.quantization.label == "gptq 4 bits/64"
    options = {"method": "int8", "bits": 8, "group_size": 128}
    assert Step("quantize", options).quantization.label == "int8"
    mix = Step("quantize", options | {"method": "gptq", "bits_for": [".*=4"]}, {"bits_per_weight": 5.37}).quantization
    assert mix.label == "gptq, mixed, 5.4 bits a weight" and mix.series == "gptq, mixed"
    assert mix == replace(mix, bits_per_weight=5.2), "a removal is compared with the same form"
    unknown = Step("quantize", options | {"method": "awq"})
    assert unknown.quantization.label == "awq" and describe(unknown) == "quantize: awq; head float"
    assert describe(Step("quantize", {"method": "none"})) == "quantize: none"
    assert made_by(PRUNED)[1] == "quantize: gptq, 4 bits, groups of 64, asymmetric; head 8 bits"
